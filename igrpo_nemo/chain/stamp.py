"""What a finished stage was made from, so that it is neither repeated nor silently reused.

stage done --write_stamp--> stamp.json: {stage, inputs, outputs}
next time  --reusable-----> its outputs are there and its inputs equal, or a `UserError` that
                            names the first input that changed, or it is to be done
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from igrpo_nemo.errors import UserError
from igrpo_nemo.files.atomic import write_or_refuse


@dataclass(frozen=True, slots=True)
class Stamp:
    """`inputs`: dotted name -> value of everything the result depends on. `outputs`: facts about
    the result, such as the step of the checkpoint, that later stages read."""

    stage: str
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any] = field(default_factory=dict)


def write_stamp(path: Path, stamp: Stamp) -> None:
    """Writes the stamp whole or not at all. Raises `UserError` where it cannot be written."""
    values = {"stage": stamp.stage, "inputs": stamp.inputs, "outputs": stamp.outputs}
    write_or_refuse(path, json.dumps(values, indent=1, sort_keys=True, default=str))


def read_stamp(path: Path) -> Stamp | None:
    """The stamp at `path`, None where there is none. Raises `UserError` for a broken one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Stamp(values["stage"], values["inputs"], values["outputs"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no stamp of a stage ({error}): remove it") from error


def reusable(path: Path, inputs: Mapping[str, Any], result: Path) -> Stamp | None:
    """The stamp of a result that is there and was made from these inputs; None: make it.

    Raises `UserError` naming the first input that changed where the result is there all the same.
    """
    stamp = read_stamp(path)
    if stamp is None or not result.exists():
        return None
    if change := first_change(stamp.inputs, inputs):
        name, before, now = change
        raise UserError(
            f"{result} was made with {name}={before!r}, now it is {now!r}: remove {result} to make "
            "it again, or choose another logger.log_dir"
        )
    return stamp


def first_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first name, in alphabetical order, whose values differ, with both; None if all agree."""
    stored = json.loads(json.dumps(dict(now), default=str))  # as it would be read back
    for name in sorted({*before, *stored}):
        if before.get(name) != stored.get(name):
            return name, before.get(name), stored.get(name)
    return None

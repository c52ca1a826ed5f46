"""What this package needs of NeMo-RL: its version, and what `names.yaml` lists.

Checked before anything is started; imports nothing of NeMo-RL until then.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from igrpo_nemo.errors import UserError

SUPPORTED = (0, 7)
"""The NeMo-RL minor version whose sources this was read and tested against."""

ROLLOUTS = ("run_multi_turn_rollout", "run_async_multi_turn_rollout")

CALLERS = {
    "nemo_rl.algorithms.grpo": ROLLOUTS,
    "nemo_rl.algorithms.async_utils.trajectory_collector": ROLLOUTS[1:],
    "nemo_rl.experience.sync_rollout_actor": ROLLOUTS,
}
"""Modules that call the rollouts by these names: trainer, async collector, data-plane actor."""


def check_nemo_rl() -> None:
    """Raises `UserError` where NeMo-RL is missing or differs from what this package stands on."""
    if sys.version_info < (3, 12) and typing.TypedDict.__module__ == "typing":
        raise UserError(
            f"NeMo-RL's configs need Python 3.12 or newer, this is {sys.version_info[0]}."
            f"{sys.version_info[1]}: use 3.13, as its container does, or engine=local"
        )
    try:
        version = importlib.import_module("nemo_rl.package_info").VERSION
    except ImportError as error:
        raise UserError(
            f"NeMo-RL cannot be imported ({error}): use its 0.7.0 container, or put the source "
            "tree of v0.7.0 on PYTHONPATH; docs/install.md says how"
        ) from error
    if tuple(version[:2]) != SUPPORTED:
        found = ".".join(str(part) for part in version[:3])
        raise UserError(
            f"NeMo-RL {found} is installed, but igrpo-nemo needs "
            f"{SUPPORTED[0]}.{SUPPORTED[1]}.x: use the container of v0.7.0"
        )
    if differences := [*_differences()]:
        raise UserError(f"this NeMo-RL differs from v0.7.0: {'; '.join(differences)}")


def needed() -> dict[str, dict[str, typing.Any]]:
    """`names.yaml`: `names` and `attributes` by module and name, `defaults` by section and key."""
    path = Path(__file__).with_suffix(".yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _differences() -> Iterator[str]:
    wanted = needed()
    for module, names in CALLERS.items():
        for name in names:
            wanted["names"].setdefault(module, {}).setdefault(name, [])
    for kind, look in {"names": _refused, "attributes": _missing}.items():
        for module, names in wanted[kind].items():
            for name, details in names.items():
                try:  # boundary: whatever NeMo-RL's modules do when they are imported
                    value = operator.attrgetter(name)(importlib.import_module(module))
                except AttributeError:
                    yield f"{module} has no {name}"
                except Exception as error:
                    reason = str(error).partition("\n")[0]
                    yield f"{module} cannot be imported ({reason})"
                else:
                    if lacking := look(value, details):
                        yield f"{module}.{name} {lacking}"


def _refused(value: typing.Any, parameters: Sequence[str]) -> str:
    accepted = inspect.signature(value).parameters if parameters else {}
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    missing = [] if anything else [each for each in parameters if each not in accepted]
    return f"takes no {', '.join(missing)}" if missing else ""


def _missing(kind: type, attributes: Sequence[str]) -> str:
    """Attributes that a class neither has nor, by its source, gives to its objects."""
    source = inspect.getsource(kind)
    missing = [a for a in attributes if not hasattr(kind, a) and f"self.{a} = " not in source]
    return f"has no {', '.join(missing)}" if missing else ""

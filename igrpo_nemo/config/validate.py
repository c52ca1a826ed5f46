"""Plain values to a typed `Config`; what is wrong with them, each in a line that says what works.

A run folder of an earlier version names every key: a gone key with a value that changed nothing is
left out of what is read, with any other it is refused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from igrpo_nemo.config.nemo_keys import TAGS
from igrpo_nemo.config.nemo_schema import nemo_schema
from igrpo_nemo.config.schema import Config, nearest_key, newer_keys
from igrpo_nemo.config.section import at
from igrpo_nemo.errors import UserError
from igrpo_nemo.files.scrub import scrub

SHOWN_PROBLEMS = 3
"""A message names no more problems than this and counts the others."""

GONE: dict[str, tuple[tuple[Any, ...], str]] = {
    "igrpo.short_circuit": (
        ("off", False),  # YAML reads a bare `off` as false
        "it saved no time on either engine: leave it out, Stage 1 is sampled whole",
    ),
    "igrpo.val_temperature": ((0.6,), "it is igrpo.validation.temperature"),
    "igrpo.val_top_p": ((0.95,), "it is igrpo.validation.top_p"),
} | {
    f"igrpo.warmup.{name}": ((value,), "it is the demonstrator's own: leave it out")
    for name, value in {
        "draft_share": 0.5,
        "right_draft_share": 0.3,
        "fixed_error_share": 0.3,
        "fixed_error_rate": 0.7,
        "slip": 0.03,
        "trust": 0.95,
        "mend": 0.8,
    }.items()
}
"""Keys that earlier versions knew: the values under which one changed nothing; what to do."""


def validated(
    values: Mapping[str, Any],
    groups: Iterable[str] = (),
    default: Callable[[str], Any] = lambda path: None,
) -> Config:
    """The typed config of plain nested values; nothing is derived yet.

    Raises `UserError` naming every unknown key (with the nearest known one), missing key and wrong
    value by its dotted path, in one line. `groups` are names of config groups, which an unknown key
    at the root may have meant; `default` knows what a key holds where nobody overrides it.
    """
    try:
        config = Config.model_validate(without_gone(values))
        unknown = [path for path in newer_keys(config) if path not in nemo_schema().newer]
        if not unknown:
            return config
        problems = [_unknown(path, groups) for path in unknown]
    except ValidationError as error:
        problems = [_describe(problem, groups, default) for problem in error.errors()]
    shown = "; ".join(problems[:SHOWN_PROBLEMS])
    more = len(problems) - SHOWN_PROBLEMS
    raise UserError(f"{shown}; and {more} more" if more > 0 else shown)


def without_gone(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of plain values without the gone keys that changed nothing."""
    kept = copy.deepcopy(dict(values))
    for path, (unused, _) in GONE.items():
        parent, _, leaf = path.rpartition(".")
        section = at(kept, parent)
        if isinstance(section, dict) and leaf in section and section[leaf] in unused:
            del section[leaf]
    return kept


def _describe(problem: Any, groups: Iterable[str], default: Callable[[str], Any]) -> str:
    path = ".".join(str(part) for part in problem["loc"] if part not in TAGS)
    if problem["type"] == "extra_forbidden":
        gone = next((key for key in GONE if f"{path}.".startswith(f"{key}.")), None)
        if gone is not None:
            return f"{gone} is gone: {GONE[gone][1]}"
        return _unknown(path, groups)
    if problem["type"] == "missing":
        return f"{path} is missing"
    # pydantic writes "Input should be ..." or "String should have ...": the key stands there.
    message = re.sub(r"^(Value error, |\w+ (?=should ))", "", problem["msg"])
    # Scrubbed: what is refused may be a secret that stands in the wrong place.
    value = scrub({path: problem["input"]})
    wrong = _shown(value[path] if isinstance(value, dict) else None)
    return f"{path}={wrong} {message}{_remedy(path, problem['input'], default(path))}"


def _unknown(path: str, groups: Iterable[str]) -> str:
    near = nearest_key(path, groups)
    hint = f"did you mean {near}?" if near else "`igrpo keys` lists the known ones"
    return f"unknown key {path}: {hint}"


def _remedy(path: str, wrong: Any, works: Any) -> str:
    """`: set key=value`, where a plain value is known to work."""
    if works is None or works == wrong or not isinstance(works, bool | int | float | str):
        return ""
    text = str(works).lower() if isinstance(works, bool) else str(works)
    return f": set {path}={text}" if text and not set(text) & set("\n {}'$") else ""


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

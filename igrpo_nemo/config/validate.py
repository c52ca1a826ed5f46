"""Plain values to a typed `Config`, and pydantic's complaints as one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from igrpo_nemo.config.keys import nearest_key
from igrpo_nemo.config.schema import Config
from igrpo_nemo.errors import UserError

SHOWN_PROBLEMS = 3
"""A message names no more problems than this and counts the others."""


def validated(values: Mapping[str, Any], groups: Iterable[str] = ()) -> Config:
    """The typed config of plain nested values; nothing is derived yet.

    Raises `UserError` naming every unknown key (with the nearest known one), missing key and wrong
    value by its dotted path, in one line. `groups` are names of config groups, which an unknown key
    at the root may have meant.
    """
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        problems = [_describe(problem, groups) for problem in error.errors()]
    shown = "; ".join(problems[:SHOWN_PROBLEMS])
    more = len(problems) - SHOWN_PROBLEMS
    raise UserError(f"{shown}; and {more} more" if more > 0 else shown)


def _describe(problem: Any, groups: Iterable[str]) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = nearest_key(path, groups)
        hint = f"did you mean {near}?" if near else "`igrpo keys` lists the known ones"
        return f"unknown key {path}: {hint}"
    if problem["type"] == "missing":
        return f"{path} is missing"
    # pydantic writes "Input should be ..." or "String should have ...": the key stands there.
    message = re.sub(r"^(Value error, |\w+ (?=should ))", "", problem["msg"])
    return f"{path}={_shown(problem['input'])} {message}"


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

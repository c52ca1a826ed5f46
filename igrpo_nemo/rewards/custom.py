"""Reward functions of the user's own, each named by its path `module:function`.

    function(problem, completion, columns) -> a number, or a dict of them, whose sum is the reward

They run where answers are compared, under the same limits. Whatever one raises, returns or does to
its process, the completion's component is 0 and counted; the run goes on.
"""

from __future__ import annotations

import json
import math
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from igrpo_nemo.by_path import function_at
from igrpo_nemo.errors import UserError
from igrpo_nemo.files.display_text import shorten
from igrpo_nemo.types import Problem, ScoreRequest

_SHOWN = 300


class Outcome(NamedTuple):
    """What a function returned for a completion: its parts by name, "" for a bare number's.

    Without parts, `error` is a line that says why.
    """

    parts: dict[str, float]
    error: str = ""


NO_REPLY = Outcome(
    {},
    "no result within env.math.item_timeout_s, env.math.memory_limit_mb and "
    "env.math.group_deadline_s",
)


class Caller(Protocol):
    """Where functions run: in this process, or the verifier's pool."""

    def outcomes(self, path: str, requests: Sequence[ScoreRequest]) -> list[Outcome]: ...


def component_name(path: str) -> str:
    """The function's own name, under which its component is known."""
    return path.rpartition(":")[2]


def outcome(path: str, problem: Problem, text: str) -> Outcome:
    """Calls the function on one completion, in this process."""
    try:
        columns = json.loads(problem.columns or "{}")
        found = function_at(path)(problem, text, columns)
        parts = found if isinstance(found, Mapping) else {"": found}
        return Outcome({str(name): _number(value) for name, value in parts.items()})
    except UserError as error:
        return Outcome({}, str(error))
    except (Exception, SystemExit) as error:  # boundary: the function is the user's
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}, line {place.lineno}"
        return Outcome({}, shorten(f"{where}: {type(error).__name__}: {error}", _SHOWN))


def _number(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(shorten(f"returned {value!r}, which is no finite number", _SHOWN))
    return number


class CustomReward:
    """The component of one function: NAME, NAME/<part> for each part of a dict, and NAME/failed,
    1 where there was no result. The first failure is told in a warning."""

    def __init__(self, path: str, caller: Caller) -> None:
        self.path = path
        self._name = component_name(path)
        self._caller = caller
        self._warned = False

    def __call__(self, requests: Sequence[ScoreRequest], verdicts: Any) -> list[dict[str, float]]:
        return [self._components(each) for each in self._caller.outcomes(self.path, requests)]

    def _components(self, found: Outcome) -> dict[str, float]:
        if found.error and not self._warned:
            self._warned = True
            warnings.warn(
                f"igrpo.reward.custom: {self.path} failed, the completion gets 0: {found.error}; "
                f"further failures are counted in reward/{self._name}/failed",
                stacklevel=2,
            )
        parts = {f"{self._name}/{part}": value for part, value in found.parts.items() if part}
        total, failed = math.fsum(found.parts.values()), float(bool(found.error))
        return {**parts, self._name: total, f"{self._name}/failed": failed}

"""Where NeMo-RL calls our rollout: three modules, put back afterwards.

`grpo_train` has no hook for rollouts. While the seam is installed, the names of its rollouts
(`run_multi_turn_rollout` and the asynchronous ones) in the modules that call them dispatch on the
type of `task_to_env`: a `RunMap` rolls out itself, with NeMo-RL's own function at hand; a plain
dict gets NeMo-RL's own with the arguments as they came.

NeMo-RL passes `task_to_env` untouched from the trainer to its rollout, into its Ray actors too.
Unpickling a `RunMap` installs the seam in the process it arrives in.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from igrpo_nemo.alarms import StallAlarm
from igrpo_nemo.config.schema import Config
from igrpo_nemo.data.order import solve_rates
from igrpo_nemo.nemo.failure import Reporter
from igrpo_nemo.nemo.names import callers
from igrpo_nemo.nemo.versions import rolled_out_in_groups
from igrpo_nemo.tracking.tracker import sample_rows
from igrpo_nemo.types import Rollout

SAMPLES = "igrpo_samples"
"""Among the metrics of a rollout in another process: rows for the sample table."""
SOLVE_RATES = "igrpo_solve_rates"
"""Among the metrics of a rollout, where a curriculum wants them: by the problem's id."""

_lock = threading.Lock()
_originals: list[tuple[Any, str, Callable[..., Any]]] = []


def install() -> bool:
    """Installs the seam in this process; False where it is there already."""
    with _lock:
        if _originals:
            return False
        for module, name in callers():
            original = getattr(module, name)
            _originals.append((module, name, original))
            setattr(module, name, _dispatching(original))
        return True


def uninstall() -> None:
    """Puts NeMo-RL's own functions back."""
    with _lock:
        while _originals:
            setattr(*_originals.pop())


@contextmanager
def installed() -> Iterator[None]:
    """The seam, for the duration of the outermost `with` block."""
    outermost = install()
    try:
        yield
    finally:
        if outermost:
            uninstall()


@dataclass(frozen=True, slots=True)
class RolloutCall:
    """NeMo-RL's call of its rollout: `original` is the function that it meant, `arguments` are by
    name. `concurrently`: it meant the one for the asynchronous engine."""

    original: Callable[..., tuple[Any, dict[str, Any]]]
    arguments: Mapping[str, Any]
    concurrently: bool

    def as_it_was(self) -> tuple[Any, dict[str, Any]]:
        """What NeMo-RL's own function returns: the batch and its metrics."""
        return self.original(**self.arguments)


def _dispatching(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)
    concurrently = original.__name__ != "run_multi_turn_rollout"

    def rolled_out(one: Callable[..., Any], given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        task_to_env: RunMap = given["task_to_env"]
        with task_to_env.report.watching():
            return task_to_env.roll_out(RolloutCall(one, given, concurrently))

    @functools.wraps(original)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if not isinstance(given["task_to_env"], RunMap):
            return original(*args, **kwargs)
        if inspect.isasyncgenfunction(original):
            return rolled_out_in_groups(given, rolled_out)
        return rolled_out(original, given)

    return dispatch


@dataclass
class StepClock:
    """Training steps finished so far, those before a resume included."""

    finished: int = 0


class RunMap(dict):
    """`task_to_env` that rolls out itself: of a run's problems, or of its validation.

    It travels with the run's config. `report` tells the run of a failure, from wherever it happens.
    `rollouts` are those of the last call, for sample tables; they stay in their process.
    """

    def __init__(
        self,
        task_to_env: Mapping[str, Any],
        config: Config,
        clock: StepClock | None = None,
        report: Reporter | None = None,
    ) -> None:
        super().__init__(task_to_env)
        self.config = config
        self.feedback = config.feedback
        self.weights = config.igrpo.reward.weights
        self.clock = clock or StepClock()
        self.report = report or Reporter()
        self.rollouts: list[Rollout] = []
        self._away = False
        self._lock = threading.Lock()

    def roll_out(self, call: RolloutCall) -> tuple[Any, dict[str, Any]]:
        """The batch that NeMo-RL goes on with, and the rollout's metrics."""
        raise NotImplementedError

    def watched(
        self, call: RolloutCall, items: Sequence[Any], stage: str
    ) -> tuple[Any, dict[str, Any]]:
        """What NeMo-RL's own rollout returns, which the alarm waits for as a whole."""
        ids = [item.problem.id for item in items]
        with self.alarm() as alarm, alarm.waiting(stage, ids):
            return call.as_it_was()

    def alarm(self) -> StallAlarm:
        """Tells on the terminal what a rollout waits for; to be entered."""
        patience = self.config.igrpo.stall_alarm_s
        return StallAlarm(patience, functools.partial(print, flush=True))

    def rolled_out(self, rollouts: Sequence[Rollout]) -> dict[str, Any]:
        """Takes note of a call's rollouts. In another process no log counts its steps, so calls do
        there, and the rows for the sample table go back among the metrics, which this returns."""
        self.rollouts = list(rollouts)
        metrics: dict[str, Any] = {}
        if self.config.igrpo.curriculum_keep is not None:
            metrics[SOLVE_RATES] = solve_rates(rollouts)
        if self._away:
            with self._lock:
                self.clock.finished += 1
            metrics[SAMPLES] = sample_rows(self.rollouts)
        return metrics

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (type(self), dict(self), self.config, self.clock, self.report)


def _arrive(kind: type[RunMap], *parts: Any) -> RunMap:
    install()
    arrived = kind(*parts)
    arrived.report.watch_this_actor()
    arrived._away = True
    return arrived

"""What a run's rollouts must know, on the marker map that carries it to NeMo-RL's rollout calls.

NeMo-RL passes `task_to_env` untouched from the trainer to its rollout. A `TwoStageMap` asks for the
two-stage rollout, a `SingleStageMap` for NeMo-RL's own with the project's metrics, and a plain
dict, as in validation, for NeMo-RL's own. Unpickling a map installs the seam in the process it
arrives in: so it works inside NeMo-RL's Ray actors too.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from igrpo_nemo.feedback import Feedback
from igrpo_nemo.nemo.failure import Reporter
from igrpo_nemo.nemo.prefetch import Prefetcher, StepClock
from igrpo_nemo.nemo.short_circuit import ShortCircuit
from igrpo_nemo.tracking.samples import sample_rows
from igrpo_nemo.types import Rollout

SAMPLES = "igrpo_samples"
"""Among the metrics of a rollout in another process: rows for the sample table."""


@dataclass(frozen=True, slots=True)
class TwoStageSpec:
    """What the rollout must know; plain data that travels to other processes.

    `weights` are the reward's, by component.
    """

    feedback: Feedback
    weights: Mapping[str, float]
    short_circuit: ShortCircuit = field(default_factory=ShortCircuit)


class RunMap(dict):
    """`task_to_env` with a spec. `prefetcher` and `rollouts` stay in this process; `report` tells
    the run of a failure, from wherever it happens.

    `rollouts` are those of the last call, for sample tables.
    """

    def __init__(
        self,
        task_to_env: Mapping[str, Any],
        spec: TwoStageSpec,
        clock: StepClock | None = None,
        prefetcher: Prefetcher | None = None,
        report: Reporter | None = None,
    ) -> None:
        super().__init__(task_to_env)
        self.spec = spec
        self.clock = clock or StepClock()
        self.prefetcher = prefetcher
        self.report = report or Reporter()
        self.rollouts: list[Rollout] = []
        self._away = False
        self._lock = threading.Lock()

    def rolled_out(self, rollouts: Sequence[Rollout]) -> dict[str, Any]:
        """Takes note of a call's rollouts. In another process no log counts its steps, so calls do
        there, and the rows for the sample table go back among the metrics, which this returns."""
        self.rollouts = list(rollouts)
        if not self._away:
            return {}
        with self._lock:
            self.clock.finished += 1
        return {SAMPLES: sample_rows(self.rollouts)}

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (type(self), dict(self), self.spec, self.clock.finished, self.report)


class TwoStageMap(RunMap):
    """Asks for the two-stage rollout."""


class SingleStageMap(RunMap):
    """Asks for NeMo-RL's own rollout, which is only looked at: feedback `none`."""


def _arrive(
    kind: type[RunMap],
    task_to_env: dict[str, Any],
    spec: TwoStageSpec,
    finished: int,
    report: Reporter,
) -> RunMap:
    from igrpo_nemo.nemo.seam import install

    install()
    report.watch_this_actor()
    arrived = kind(task_to_env, spec, StepClock(finished), report=report)
    arrived._away = True
    return arrived

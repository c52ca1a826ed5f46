"""The two-stage spec and the marker map that carries it to NeMo-RL's rollout calls.

NeMo-RL passes `task_to_env` untouched from the trainer to its rollout. A map of this type asks for
the two-stage rollout; a plain dict, as in validation, for NeMo-RL's own. Unpickling a map installs
the seam in the process it arrives in: so it works inside NeMo-RL's Ray actors too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from igrpo_nemo.feedback import Feedback
from igrpo_nemo.nemo.prefetch import Prefetcher, StepClock
from igrpo_nemo.nemo.short_circuit import ShortCircuit
from igrpo_nemo.types import Rollout


@dataclass(frozen=True, slots=True)
class TwoStageSpec:
    """What the rollout must know; plain data that travels to other processes.

    `weights` are the reward's, by component.
    """

    feedback: Feedback
    weights: Mapping[str, float]
    short_circuit: ShortCircuit = field(default_factory=ShortCircuit)


class TwoStageMap(dict):
    """`task_to_env` with a spec. `clock`, `prefetcher` and `rollouts` stay in this process.

    `rollouts` are those of the last call, for sample tables.
    """

    def __init__(
        self,
        task_to_env: Mapping[str, Any],
        spec: TwoStageSpec,
        clock: StepClock | None = None,
        prefetcher: Prefetcher | None = None,
    ) -> None:
        super().__init__(task_to_env)
        self.spec = spec
        self.clock = clock or StepClock()
        self.prefetcher = prefetcher
        self.rollouts: list[Rollout] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (dict(self), self.spec, self.clock.finished)


def _arrive(task_to_env: dict[str, Any], spec: TwoStageSpec, finished: int) -> TwoStageMap:
    from igrpo_nemo.nemo.seam import install

    install()
    return TwoStageMap(task_to_env, spec, StepClock(finished))

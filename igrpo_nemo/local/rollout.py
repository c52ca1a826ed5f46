"""The two-stage rollout on the embedded engine: lines 4-14 of Algorithm 1.

    problems -> q -> N drafts -> environment "draft" -> q' -> G refinements -> environment "refine"

Every draw is named by (seed, step, stage, problem), so a rollout depends neither on the batch it
was made in nor on what was sampled before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from igrpo_nemo.environment import Attempt, StepReturn, TwoStageEnvironment
from igrpo_nemo.feedback import NextPrompt
from igrpo_nemo.local.sampler import Sampler, SampleRequest, SamplingParams
from igrpo_nemo.types import Problem, Rollout, Stage


class Timer(Protocol):
    """Times a named part of a step: `with timer("draft"): ...`."""

    def __call__(self, name: str) -> AbstractContextManager[object]: ...


@dataclass(frozen=True, slots=True)
class TwoStageRollout:
    """Rolls problems out under the sampler's current policy.

    `on_stage(stage, rows_done, rows_total)` reports progress; it may raise to abandon the rollout.
    """

    environment: TwoStageEnvironment
    sampler: Sampler
    params: SamplingParams
    seed: int
    timer: Timer = lambda name: nullcontext()
    on_stage: Callable[[Stage, int, int], None] = lambda stage, done, total: None

    def __call__(self, problems: Sequence[Problem], *, step: int, draw: int = 0) -> list[Rollout]:
        """One rollout per problem, in order. `draw` counts repeated draws within a step."""
        first = [(problem, self.environment.reset(problem)) for problem in problems]
        drafted = self._stage(Stage.DRAFT, first, step, draw)
        second = [
            (result.group.problem, following)
            for result in drafted
            for following in result.observations
        ]
        refined = iter(self._stage(Stage.REFINE, second, step, draw))
        return [
            Rollout(
                problem=result.group.problem,
                drafts=result.group,
                selection=result.selection,
                refinements=tuple(next(refined).group for _ in result.observations),
            )
            for result in drafted
        ]

    def _stage(
        self, stage: Stage, prompts: Sequence[tuple[Problem, NextPrompt]], step: int, draw: int
    ) -> list[StepReturn]:
        """Samples a stage's completions and lets the environment judge them."""
        if not prompts:
            return []
        requests, seen = [], dict[str, int]()
        for problem, following in prompts:
            # A problem may have several prompts in Stage 2.
            position = seen.get(problem.id, 0)
            seen[problem.id] = position + 1
            key = f"{self.seed}/{step}/{draw}/{stage}/{problem.id}/{position}"
            requests.append(SampleRequest(following.prompt.token_ids, following.num_samples, key))
        with self.timer(str(stage)):
            completions = self.sampler.sample(
                requests,
                self.params,
                on_progress=lambda done, total: self.on_stage(stage, done, total),
            )
        attempts = [
            Attempt.at(problem, following, rows)
            for (problem, following), rows in zip(prompts, completions, strict=True)
        ]
        with self.timer("reward"):
            return self.environment.step(stage, attempts, step=step)

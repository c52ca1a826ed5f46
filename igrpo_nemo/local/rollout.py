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
        scope = f"{self.seed}/{step}/{draw}"
        firsts = [(p, self.environment.reset(p)) for p in problems]
        drafts = self._stage(Stage.DRAFT, firsts, scope, step)
        seconds = [
            (result.group.problem, observation)
            for result in drafts
            for observation in result.observations
        ]
        refined = iter(self._stage(Stage.REFINE, seconds, scope, step) if seconds else ())
        return [
            Rollout(
                problem=result.group.problem,
                drafts=result.group,
                selection=result.selection,
                refinements=tuple(next(refined).group for _ in result.observations),
            )
            for result in drafts
        ]

    def _stage(
        self, stage: Stage, prompts: Sequence[tuple[Problem, NextPrompt]], scope: str, step: int
    ) -> list[StepReturn]:
        requests = [
            SampleRequest(
                prompt_ids=following.prompt.token_ids,
                num_samples=following.num_samples,
                seed_key=f"{scope}/{stage}/{problem.id}/{position}",
            )
            for problem, following, position in _with_positions(prompts)
        ]
        with self.timer(str(stage)):
            completions = self.sampler.sample(
                requests,
                self.params,
                on_progress=lambda done, total: self.on_stage(stage, done, total),
            )
        attempts = [
            Attempt(problem, following.prompt, tuple(rows))
            for (problem, following), rows in zip(prompts, completions, strict=True)
        ]
        with self.timer("reward"):
            return self.environment.step(stage, attempts, step=step)


def _with_positions(
    prompts: Sequence[tuple[Problem, NextPrompt]],
) -> list[tuple[Problem, NextPrompt, int]]:
    """Numbers the prompts of each problem, which may have several in Stage 2."""
    seen: dict[str, int] = {}
    numbered = []
    for problem, following in prompts:
        position = seen.get(problem.id, 0)
        seen[problem.id] = position + 1
        numbered.append((problem, following, position))
    return numbered

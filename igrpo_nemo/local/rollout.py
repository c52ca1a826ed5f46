"""The two-stage rollout on the embedded engine: lines 4-14 of Algorithm 1.

    problems -> q -> N drafts -> environment "draft" -> q' -> G refinements -> environment "refine"
                                 next problems -> q -> their N drafts ─┘ (same call of the sampler)

Every draw is named by (seed, step, stage, problem), so a rollout depends neither on the batch it
was made in nor on what was sampled before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from igrpo_nemo.environment import Attempt, StepReturn, TwoStageEnvironment
from igrpo_nemo.feedback import NextPrompt
from igrpo_nemo.local.draft_watch import DraftWatch
from igrpo_nemo.local.sampler import Sampler, SampleRequest, SamplingParams, Watch
from igrpo_nemo.short_circuit import ShortCircuit
from igrpo_nemo.types import Completion, Problem, Rollout, Stage

Drafts = tuple[tuple[Completion, ...], ...]
"""The drafts of a batch: a tuple for each problem, in order."""


class Timer(Protocol):
    """Times a named part of a step: `with timer("draft"): ...`."""

    def __call__(self, name: str) -> AbstractContextManager[object]: ...


@dataclass(slots=True)
class Ahead:
    """Problems to draft for beside Stage 2 of others, and their drafts once that is done.

    The drafts are drawn under the name that they would have in draw `draw` of step `step`.
    """

    problems: Sequence[Problem]
    step: int
    draw: int = 0
    drafts: Drafts = ()


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
    short_circuit: ShortCircuit = field(default_factory=ShortCircuit)

    def __call__(
        self,
        problems: Sequence[Problem],
        *,
        step: int,
        draw: int = 0,
        drafts: Drafts | None = None,
        ahead: Ahead | None = None,
    ) -> list[Rollout]:
        """One rollout per problem, in order. `draw` counts repeated draws within a step.

        `drafts` are given where they were sampled beforehand; those of `ahead` are sampled in the
        same call as the refinements, under the same policy. With a short circuit a group of drafts
        holds those that were finished when the best one was known.
        """
        drafted = self._draft(problems, step, draw, drafts)
        refined = iter(self._refine(drafted, step, draw, ahead))
        return [
            Rollout(
                problem=result.group.problem,
                drafts=result.group,
                selection=result.selection,
                refinements=tuple(next(refined).group for _ in result.observations),
            )
            for result in drafted
        ]

    def _draft(
        self, problems: Sequence[Problem], step: int, draw: int, drafts: Drafts | None
    ) -> list[StepReturn]:
        """Stage 1: the scored drafts, the selection and q'."""
        prompts = self._first_prompts(problems)
        requests = self._requests(Stage.DRAFT, prompts, step, draw)
        if drafts is None and self.short_circuit.enabled:
            return self._draft_until_best(prompts, requests, step)
        if drafts is None:
            drafts = self._sample(Stage.DRAFT, requests)
        return self._grade(Stage.DRAFT, prompts, drafts, step)

    def _draft_until_best(
        self,
        prompts: Sequence[tuple[Problem, NextPrompt]],
        requests: Sequence[SampleRequest],
        step: int,
    ) -> list[StepReturn]:
        environment, limit = self.environment, self.params.max_new_tokens
        with DraftWatch(self.short_circuit, environment, prompts, limit) as watch:
            self._sample(Stage.DRAFT, requests, watch)
            with self.timer("reward"):
                return [environment.after_drafts(group, step) for group in watch.groups()]

    def _refine(
        self, drafted: Sequence[StepReturn], step: int, draw: int, ahead: Ahead | None
    ) -> list[StepReturn]:
        """Stage 2 and, in the same call of the sampler, the drafts of `ahead`."""
        prompts = [
            (result.group.problem, following)
            for result in drafted
            for following in result.observations
        ]
        requests = self._requests(Stage.REFINE, prompts, step, draw)
        if ahead is not None:
            beside = self._first_prompts(ahead.problems)
            requests += self._requests(Stage.DRAFT, beside, ahead.step, ahead.draw)
        if not requests:
            return []
        completions = self._sample(Stage.REFINE, requests)
        if ahead is not None:
            ahead.drafts = completions[len(prompts) :]
        return self._grade(Stage.REFINE, prompts, completions[: len(prompts)], step)

    def _first_prompts(self, problems: Sequence[Problem]) -> list[tuple[Problem, NextPrompt]]:
        return [(problem, self.environment.reset(problem)) for problem in problems]

    def _requests(
        self, stage: Stage, prompts: Sequence[tuple[Problem, NextPrompt]], step: int, draw: int
    ) -> list[SampleRequest]:
        return [
            SampleRequest(
                prompt_ids=following.prompt.token_ids,
                num_samples=following.num_samples,
                seed_key=f"{self.seed}/{step}/{draw}/{stage}/{problem.id}/{position}",
            )
            for problem, following, position in _with_positions(prompts)
        ]

    def _sample(
        self, stage: Stage, requests: Sequence[SampleRequest], watch: Watch = lambda ended: ()
    ) -> Drafts:
        with self.timer(str(stage)):
            completions = self.sampler.sample(
                requests,
                self.params,
                on_progress=lambda done, total: self.on_stage(stage, done, total),
                watch=watch,
            )
        return tuple(tuple(rows) for rows in completions)

    def _grade(
        self,
        stage: Stage,
        prompts: Sequence[tuple[Problem, NextPrompt]],
        completions: Drafts,
        step: int,
    ) -> list[StepReturn]:
        attempts = [
            Attempt(problem, following.prompt, rows)
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

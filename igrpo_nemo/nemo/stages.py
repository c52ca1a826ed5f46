"""Stage 1 and Stage 2 of many problems, concurrently, as functions over plain data.

    item ─ draft_stage ─> StepReturn ─ refine_stage ─> Rollout          (Algorithm 1, lines 4-14)
    roll_out: both, for every problem at its own pace; no barrier between the stages

An engine samples one completion at a time and an environment scores one group; both are awaited.
Nothing here knows NeMo-RL, Ray or tensors, so the same code runs against a model of an engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from igrpo_nemo.environment import Attempt, StepReturn
from igrpo_nemo.feedback import Feedback
from igrpo_nemo.nemo.errors import RolloutError
from igrpo_nemo.nemo.short_circuit import ScoredDrafts, ShortCircuit, sample_until_best
from igrpo_nemo.nemo.speculation import BUSY, EarlyRefinement, EarlyStarts
from igrpo_nemo.types import Completion, Group, Problem, Prompt, Rollout, Score, Stage


@dataclass(frozen=True, slots=True)
class Item:
    """A problem of the step with its q, at a position of the batch.

    `overlong`: NeMo-RL cut the prompt and gave the problem zero weight; it has no Stage 1.
    """

    problem: Problem
    prompt: Prompt
    position: int
    overlong: bool = False


class Engine(Protocol):
    """Samples one completion of a prompt. Requests with an equal `route` share a prefix cache.

    A cancelled call frees what it holds where the backend can. `load` is the number of requests in
    flight where a new route would go.
    """

    def sample(self, prompt: Prompt, route: str) -> Awaitable[Completion]: ...
    def load(self) -> int: ...


class Environment(Protocol):
    """`TwoStageEnvironment.step` for one attempt; `scores` are given where they are known."""

    def step(
        self, stage: Stage | None, attempt: Attempt, *, scores: tuple[Score, ...] | None = None
    ) -> Awaitable[StepReturn]: ...


@dataclass(frozen=True, slots=True)
class Backends:
    """What a rollout runs on, and how."""

    engine: Engine
    environment: Environment
    feedback: Feedback
    short_circuit: ShortCircuit = field(default_factory=ShortCircuit)
    early_starts: EarlyStarts = field(default_factory=EarlyStarts)


async def sample_drafts(item: Item, backends: Backends) -> list[Completion]:
    """The drafts of one problem, all N of them, unscored (line 5)."""
    engine, route = backends.engine, f"{item.position}/{Stage.DRAFT}"
    return await together(
        [engine.sample(item.prompt, route) for _ in range(backends.feedback.num_drafts)]
    )


async def draft_stage(
    item: Item, backends: Backends, drafts: Sequence[Completion] | None = None
) -> StepReturn:
    """Stage 1 of one problem: N drafts, their rewards, the selection and q' (lines 5-8).

    `drafts` are given where they were sampled beforehand. With a short circuit the group holds the
    drafts that were finished when the best one was known.
    """
    attempt = Attempt(item.problem, item.prompt, tuple(drafts or ()))
    if drafts is None and backends.short_circuit.enabled:
        attempt, scores = await sample_until_best(item, backends)
        return await backends.environment.step(Stage.DRAFT, attempt, scores=scores)
    if drafts is None:
        drafts = await sample_drafts(item, backends)
        attempt = Attempt(item.problem, item.prompt, tuple(drafts))
    return await backends.environment.step(Stage.DRAFT, attempt)


async def refine_stage(item: Item, drafted: StepReturn, backends: Backends) -> Rollout:
    """Stage 2 of one problem: G refinements of each q', and their rewards (lines 9-12)."""
    refinements = []
    for index, following in enumerate(drafted.observations):
        route = f"{item.position}/{Stage.REFINE}/{index}"
        completions = await together(
            [backends.engine.sample(following.prompt, route) for _ in range(following.num_samples)]
        )
        attempt = Attempt(item.problem, following.prompt, tuple(completions))
        scored = await backends.environment.step(Stage.REFINE, attempt)
        refinements.append(scored.group)
    return Rollout(item.problem, drafted.group, drafted.selection, tuple(refinements))


async def _both_stages(item: Item, backends: Backends) -> Rollout:
    """Both stages under `index_order`: Stage 2 may begin while a single draft is left."""

    def refine(drafted: StepReturn) -> Awaitable[Rollout]:
        return refine_stage(item, drafted, backends)

    def chosen(drafts: ScoredDrafts) -> Awaitable[StepReturn]:
        return backends.environment.step(Stage.DRAFT, drafts[0], scores=drafts[1])

    def one_left(drafts: ScoredDrafts) -> None:
        if backends.engine.load() < BUSY:
            early.begin(chosen(drafts))

    early = EarlyRefinement(refine, backends.early_starts)
    try:
        with RolloutError.at(item.problem, Stage.DRAFT):
            drafted = await chosen(await sample_until_best(item, backends, one_left))
        with RolloutError.at(item.problem, Stage.REFINE):
            return await early.rollout(drafted)
    finally:
        await early.close()


def unscored(item: Item, completion: Completion) -> Rollout:
    """A problem whose prompt NeMo-RL cut: one answer, because it wants a row, worth nothing."""
    group = Group(item.problem, Stage.DRAFT, item.prompt, (completion,), (Score(0.0),))
    return Rollout(item.problem, group)


async def roll_out_problem(
    item: Item,
    backends: Backends,
    drafts: Sequence[Completion] | None = None,
    meanwhile: Callable[[], Awaitable[None]] | None = None,
) -> Rollout:
    """Both stages of one problem. `meanwhile` runs beside Stage 2: the next step's drafts.

    Raises `RolloutError` naming the problem and the stage for whatever goes wrong below.
    """
    if item.overlong:
        with RolloutError.at(item.problem, "overlong"):
            route = f"{item.position}/{Stage.DRAFT}"
            answer = backends.engine.sample(item.prompt, route)
            beside = [meanwhile()] if meanwhile else []
            completion, *_ = await together([answer, *beside])
            return unscored(item, completion)
    if drafts is None and backends.short_circuit.mode == "index_order":
        return await _both_stages(item, backends)
    with RolloutError.at(item.problem, Stage.DRAFT):
        drafted = await draft_stage(item, backends, drafts)
    with RolloutError.at(item.problem, Stage.REFINE):
        if meanwhile is None:
            return await refine_stage(item, drafted, backends)
        rollout, _ = await together([refine_stage(item, drafted, backends), meanwhile()])
        return rollout


async def together(awaitables: Sequence[Awaitable]) -> list:
    """Awaits all; the first error cancels the others, waits for them, and is raised as it is."""
    tasks = [asyncio.ensure_future(each) for each in awaitables]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(slots=True)
class Ahead:
    """Problems of the next step to draft for beside this step's refinements, and their drafts.

    The upcoming problem at a position waits for the drafts of this step's problem there.
    """

    upcoming: Sequence[Item] = ()
    drafts: dict[int, Sequence[Completion]] = field(default_factory=dict)

    def beside(self, item: Item, backends: Backends) -> Callable[[], Awaitable[None]] | None:
        """What to run beside the Stage 2 of `item`."""
        if item.position >= len(self.upcoming):
            return None
        upcoming = self.upcoming[item.position]

        async def draft_ahead() -> None:
            with RolloutError.at(upcoming.problem, Stage.DRAFT):
                self.drafts[upcoming.position] = await sample_drafts(upcoming, backends)

        return draft_ahead


async def roll_out(
    items: Sequence[Item],
    backends: Backends,
    taken: Mapping[int, Sequence[Completion]] | None = None,
    ahead: Ahead | None = None,
) -> list[Rollout]:
    """All problems concurrently, in the order given.

    `taken` are drafts sampled beforehand, by position; `ahead` collects those of the next step.
    """
    ahead = ahead or Ahead()
    return await together(
        [
            roll_out_problem(
                item,
                backends,
                None if taken is None else taken[item.position],
                ahead.beside(item, backends),
            )
            for item in items
        ]
    )

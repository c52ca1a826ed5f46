"""Stage 1 and Stage 2 of many problems, concurrently, as functions over plain data.

    item ─ draft_stage ─> StepReturn ─ refine_stage ─> Rollout          (Algorithm 1, lines 4-12)
    roll_out: both, for every problem at its own pace; no barrier between the stages

An engine samples one completion at a time and an environment scores one group; both are awaited.
Nothing here knows NeMo-RL, Ray or tensors, so the same code runs against a model of an engine.
Legend: N drafts, G refinements of each q'.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol

from igrpo_nemo.environment import Attempt, StepReturn
from igrpo_nemo.feedback import NextPrompt
from igrpo_nemo.nemo.failure import RolloutError
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

    A cancelled call frees what it holds where the backend can.
    """

    def sample(self, prompt: Prompt, route: str) -> Awaitable[Completion]: ...


class Environment(Protocol):
    """`TwoStageEnvironment.step` for one attempt."""

    def step(self, stage: Stage | None, attempt: Attempt) -> Awaitable[StepReturn]: ...


@dataclass(frozen=True, slots=True)
class Backends:
    """What a rollout runs on; `num_drafts` is N."""

    engine: Engine
    environment: Environment
    num_drafts: int


async def sample_drafts(item: Item, on: Backends) -> list[Completion]:
    """The N drafts of one problem, unscored (line 5)."""
    with RolloutError.at(item.problem, Stage.DRAFT):
        route = f"{item.position}/{Stage.DRAFT}"
        return await together([on.engine.sample(item.prompt, route) for _ in range(on.num_drafts)])


async def score_drafts(item: Item, drafts: Sequence[Completion], on: Backends) -> StepReturn:
    """The rewards of the drafts, the selection and q' (lines 6-8)."""
    with RolloutError.at(item.problem, Stage.DRAFT):
        return await on.environment.step(
            Stage.DRAFT, Attempt(item.problem, item.prompt, tuple(drafts))
        )


async def refine_stage(item: Item, drafted: StepReturn, on: Backends) -> Rollout:
    """G refinements of each q', and their rewards (lines 9-12)."""

    async def refine(index: int, following: NextPrompt) -> Group:
        route = f"{item.position}/{Stage.REFINE}/{index}"
        samples = range(following.num_samples)
        completions = await together([on.engine.sample(following.prompt, route) for _ in samples])
        attempt = Attempt(item.problem, following.prompt, tuple(completions))
        return (await on.environment.step(Stage.REFINE, attempt)).group

    with RolloutError.at(item.problem, Stage.REFINE):
        groups = await together([refine(n, each) for n, each in enumerate(drafted.observations)])
    return Rollout(item.problem, drafted.group, drafted.selection, tuple(groups))


async def answer_overlong(item: Item, on: Backends) -> Rollout:
    """A problem whose prompt NeMo-RL cut: one answer, because it wants a row, worth nothing."""
    with RolloutError.at(item.problem, "overlong"):
        return unscored(item, await on.engine.sample(item.prompt, f"{item.position}/{Stage.DRAFT}"))


def unscored(item: Item, completion: Completion) -> Rollout:
    """The rollout of a problem without Stage 1."""
    group = Group(item.problem, Stage.DRAFT, item.prompt, (completion,), (Score(0.0),))
    return Rollout(item.problem, group)


async def roll_out_problem(item: Item, on: Backends) -> Rollout:
    """Both stages of one problem.

    Raises `RolloutError` naming the problem and the stage for whatever goes wrong below.
    """
    if item.overlong:
        return await answer_overlong(item, on)
    drafted = await score_drafts(item, await sample_drafts(item, on), on)
    return await refine_stage(item, drafted, on)


async def roll_out(items: Sequence[Item], on: Backends) -> list[Rollout]:
    """All problems concurrently, in the order given."""
    return await together([roll_out_problem(item, on) for item in items])


async def together(awaitables: Sequence[Awaitable]) -> list:
    """Awaits all; the first error cancels the others, waits for them, and is raised as it is."""
    tasks = [asyncio.ensure_future(each) for each in awaitables]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

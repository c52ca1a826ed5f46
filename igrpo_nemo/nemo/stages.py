"""Stage 1 and Stage 2 of a step's problems, as functions over plain data.

    items ─ drafts, scored ─> StepReturn ─ refinements, scored ─> Rollout  (Algorithm 1, 4-12)
    roll_out:     the problems stage by stage; an engine is asked once for each stage
    at_own_pace:  every problem by itself, concurrently; no barrier between the stages

An engine samples groups and lets the environment score each of them; both are awaited. Nothing here
knows NeMo-RL, Ray or tensors, so the same code runs against a model of an engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from igrpo_nemo.alarms import StallAlarm
from igrpo_nemo.environment import Attempt, StepReturn
from igrpo_nemo.feedback import NextPrompt
from igrpo_nemo.nemo.failure import RolloutError
from igrpo_nemo.types import Completion, Group, Problem, Prompt, Rollout, Score, Stage

AHEAD = "draft ahead"
"""In the place of a stage: drafts of the next step, sampled beside this step's refinements."""


@dataclass(frozen=True, slots=True)
class Item:
    """A problem of the step with its q, at a position of the batch.

    `overlong`: NeMo-RL cut the prompt and gave the problem zero weight. It has one answer, because
    NeMo-RL wants a row, which nobody scores, and no Stage 2.
    """

    problem: Problem
    prompt: Prompt
    position: int
    overlong: bool = False


@dataclass(frozen=True, slots=True)
class Wanted:
    """A group to sample: whose it is, in which stage (or `AHEAD`), from which prompt."""

    item: Item
    stage: str
    next: NextPrompt


Then = Callable[[Wanted, Sequence[Completion]], Awaitable[StepReturn]]


class Engine(Protocol):
    """Samples groups, and awaits `then` of each as soon as it may; returns what that returned, in
    order. Raises `RolloutError` naming the problem. A cancelled call frees what it holds."""

    def sample(self, wanted: Sequence[Wanted], then: Then) -> Awaitable[list[StepReturn]]: ...


class Environment(Protocol):
    def step(self, stage: Stage, attempt: Attempt) -> Awaitable[StepReturn]: ...


@dataclass(frozen=True, slots=True)
class Backends:
    """What a rollout runs on; `num_drafts` is N. `alarm` knows what is waited for."""

    engine: Engine
    environment: Environment
    num_drafts: int
    alarm: StallAlarm = StallAlarm(0, print)

    def drafts_of(self, item: Item, stage: str = Stage.DRAFT) -> Wanted:
        count = 1 if item.overlong else self.num_drafts
        return Wanted(item, stage, NextPrompt(item.prompt, count))

    async def sample(self, wanted: Sequence[Wanted]) -> list[StepReturn]:
        """The groups, each sampled and scored, in order."""
        waits = [(each, ExitStack()) for each in wanted]

        async def then(done: Wanted, completions: Sequence[Completion]) -> StepReturn:
            next(wait for each, wait in waits if each is done).close()
            return await self.score(done, completions)

        with ExitStack() as stack:
            for each, wait in waits:
                problem = each.item.problem.id
                stack.enter_context(wait)
                wait.enter_context(self.alarm.waiting(f"{each.stage}, sampling", [problem]))
            return await self.engine.sample(wanted, then)

    async def score(self, wanted: Wanted, completions: Sequence[Completion]) -> StepReturn:
        """The group with its rewards and, of drafts, the selection and every q'."""
        problem, sampled = wanted.item.problem, tuple(completions)
        if wanted.item.overlong or wanted.stage == AHEAD:
            scores = (Score(0.0),) * len(sampled)
            group = Group(problem, Stage.DRAFT, wanted.next.prompt, sampled, scores)
            return StepReturn(group, None, (), True)
        stage = f"{wanted.stage}, rewards"
        with RolloutError.at(problem, stage), self.alarm.waiting(stage, [problem.id]):
            attempt = Attempt.at(problem, wanted.next, sampled)
            return await self.environment.step(Stage(wanted.stage), attempt)


Drafts = Sequence[Sequence[Completion]]
"""N completions of q for each position of a batch."""


async def roll_out(
    items: Sequence[Item], on: Backends, drafts: Drafts | None = None, upcoming: Sequence[Item] = ()
) -> tuple[list[Rollout], list[Sequence[Completion]]]:
    """Both stages of the problems, and the drafts of the `upcoming` ones at their positions.

    `drafts` were sampled beforehand, unless None. The refinements of a problem and the drafts for
    its place in the next batch are asked for side by side, so that contiguous shards of an engine
    get equal shares of both. Raises `RolloutError` naming problem and stage of what goes wrong.
    """
    first = [on.drafts_of(item) for item in items]
    if drafts is None:
        drafted = await on.sample(first)
    else:
        drafted = await together([on.score(each, drafts[each.item.position]) for each in first])
    wanted: list[Wanted] = []
    for item, step in zip(items, drafted, strict=True):
        wanted += [Wanted(item, Stage.REFINE, following) for following in step.observations]
        following = upcoming[item.position : item.position + 1]
        wanted += [on.drafts_of(each, AHEAD) for each in following]
    found = await on.sample(wanted)
    groups: dict[int, list[Group]] = {item.position: [] for item in items}
    ahead = []
    for each, step in zip(wanted, found, strict=True):
        if each.stage == AHEAD:
            ahead.append(step.group.completions)
        else:
            groups[each.item.position].append(step.group)
    rollouts = [
        Rollout(item.problem, step.group, step.selection, tuple(groups[item.position]))
        for item, step in zip(items, drafted, strict=True)
    ]
    return rollouts, ahead


async def at_own_pace(
    items: Sequence[Item], on: Backends, drafts: Drafts | None = None, upcoming: Sequence[Item] = ()
) -> tuple[list[Rollout], list[Sequence[Completion]]]:
    """`roll_out` of every problem by itself, all concurrently; the same in the same order."""
    each = await together([roll_out([item], on, drafts, upcoming) for item in items])
    return [r for rollouts, _ in each for r in rollouts], [a for _, ahead in each for a in ahead]


async def one_by_one(
    wanted: Sequence[Wanted], then: Then, sample: Callable[[Wanted], Awaitable[list[Completion]]]
) -> list[StepReturn]:
    """An engine's `sample` where it samples groups independently: none waits for another."""

    async def group(each: Wanted) -> StepReturn:
        with RolloutError.at(each.item.problem, each.stage):
            completions = await sample(each)
        return await then(each, completions)

    return await together([group(each) for each in wanted])


async def together(awaitables: Sequence[Awaitable]) -> list:
    """Awaits all; the first error cancels the others, waits for them, and is raised as it is."""
    tasks = [asyncio.ensure_future(each) for each in awaitables]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

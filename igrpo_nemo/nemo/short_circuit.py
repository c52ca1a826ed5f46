"""`igrpo.short_circuit` on an engine that samples one completion at a time.

    N drafts, each sampled and scored by its own task -> rule -> the tasks that no longer matter
                                                                 are cancelled
Where a single draft is left, the caller may go ahead with the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from igrpo_nemo.environment import Attempt
from igrpo_nemo.short_circuit import ShortCircuit
from igrpo_nemo.types import Completion, Score, Stage

if TYPE_CHECKING:
    from igrpo_nemo.nemo.stages import Backends, Item

__all__ = ["ScoredDrafts", "ShortCircuit", "sample_until_best"]

ScoredDrafts = tuple[Attempt, tuple[Score, ...]]


async def sample_until_best(
    item: Item, backends: Backends, one_left: Callable[[ScoredDrafts], None] | None = None
) -> ScoredDrafts:
    """The drafts that were finished when the best one was known, by index, with their scores.

    `one_left` is called with the drafts so far when a single one is still of use.
    """
    rule = backends.short_circuit
    route = f"{item.position}/{Stage.DRAFT}"

    async def sample_and_score() -> tuple[Completion, Score]:
        completion = await backends.engine.sample(item.prompt, route)
        attempt = Attempt(item.problem, item.prompt, (completion,))
        scored = await backends.environment.step(None, attempt)
        return completion, scored.group.scores[0]

    tasks = [asyncio.ensure_future(sample_and_score()) for _ in range(backends.feedback.num_drafts)]
    try:
        while running := _still_of_use(tasks, rule):
            if len(running) == 1 < len(tasks) and one_left is not None:
                one_left(_scored(item, tasks))
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return _scored(item, tasks)


def _scored(item: Item, tasks: list[asyncio.Task]) -> ScoredDrafts:
    finished = [task.result() for task in tasks if task.done() and not task.cancelled()]
    completions = tuple(completion for completion, _ in finished)
    return Attempt(item.problem, item.prompt, completions), tuple(score for _, score in finished)


def _still_of_use(tasks: list[asyncio.Task], rule: ShortCircuit) -> list[asyncio.Task]:
    """The running tasks whose outcome still matters; cancels the others."""
    known = [
        rule.unbeatable(*task.result()) if task.done() and not task.cancelled() else None
        for task in tasks
    ]
    given_up = rule.given_up(known)
    for index in given_up:
        tasks[index].cancel()
    return [task for i, task in enumerate(tasks) if not task.done() and i not in given_up]

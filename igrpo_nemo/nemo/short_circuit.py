"""Stage 1 that ends when the best draft is known: `igrpo.short_circuit`.

A draft at the known maximum reward cannot be beaten. With `index_order` it ends Stage 1 once every
draft before it is done, which is exactly the arg max with first-index ties; with `first` it ends
Stage 1 at once, which favours short drafts. Drafts still running are cancelled.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from igrpo_nemo.environment import Attempt
from igrpo_nemo.types import Completion, Score, Stage

if TYPE_CHECKING:
    from igrpo_nemo.nemo.stages import Backends, Item


@dataclass(frozen=True, slots=True)
class ShortCircuit:
    """`best_reward` is the highest reward that a draft can have.

    `finished_only`: a truncated draft does not end Stage 1, because a finished one of equal reward
    is preferred (`igrpo.rank_truncated_last`).
    """

    mode: Literal["off", "index_order", "first"] = "off"
    best_reward: float = 0.0
    finished_only: bool = True

    @property
    def enabled(self) -> bool:
        return self.mode != "off"

    def unbeatable(self, completion: Completion, score: Score) -> bool:
        if self.finished_only and completion.truncated:
            return False
        return score.reward >= self.best_reward


async def sample_until_best(item: Item, backends: Backends) -> tuple[Attempt, tuple[Score, ...]]:
    """The drafts that were finished when the best one was known, by index, with their scores."""
    rule = backends.short_circuit
    route = f"{item.position}/{Stage.DRAFT}"

    async def sample_and_score() -> tuple[Completion, Score]:
        completion = await backends.engine.sample(item.prompt, route)
        attempt = Attempt(item.problem, item.prompt, (completion,))
        scored = await backends.environment.step(None, attempt)
        return completion, scored.group.scores[0]

    tasks = [asyncio.ensure_future(sample_and_score()) for _ in range(backends.feedback.num_drafts)]
    try:
        while not _is_over(tasks, rule):
            running = [task for task in tasks if not task.done()]
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            _cancel_beaten(tasks, rule)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    finished = [task.result() for task in tasks if not task.cancelled()]
    completions = tuple(completion for completion, _ in finished)
    return Attempt(item.problem, item.prompt, completions), tuple(score for _, score in finished)


def _is_over(tasks: list[asyncio.Task], rule: ShortCircuit) -> bool:
    """Whether nothing that runs could still matter."""
    if all(task.done() for task in tasks):
        return True
    winner = _first_unbeatable(tasks, rule)
    if winner is None:
        return False
    return rule.mode == "first" or all(task.done() for task in tasks[:winner])


def _cancel_beaten(tasks: list[asyncio.Task], rule: ShortCircuit) -> None:
    """Drafts behind an unbeatable one lose every tie against it."""
    winner = _first_unbeatable(tasks, rule)
    if winner is not None:
        for task in tasks[winner + 1 :]:
            task.cancel()


def _first_unbeatable(tasks: list[asyncio.Task], rule: ShortCircuit) -> int | None:
    for index, task in enumerate(tasks):
        if task.done() and not task.cancelled() and rule.unbeatable(*task.result()):
            return index
    return None

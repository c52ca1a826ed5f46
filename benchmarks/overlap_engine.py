"""A model of an engine like vLLM in virtual time, for `rollout_overlap.py`.

    sample(groups)        ─> EngineModel: continuous batching; a decode step lasts
                             BASE_S + PER_SEQUENCE_S x running sequences
    in_virtual_time(work) ─> the seconds that it would take

The event loop's clock is the model's: nothing waits, and what runs on it is the product's own code.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import random
import selectors
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from igrpo_nemo.environment import Attempt, StepReturn
from igrpo_nemo.feedback import BestDraft, NextPrompt
from igrpo_nemo.nemo.stages import Then, Wanted, one_by_one, together
from igrpo_nemo.types import Completion, Group, Prompt, Score, Stage, StopReason

BASE_S = 0.012
PER_SEQUENCE_S = 0.000075
MEAN_TOKENS, SIGMA, MAX_TOKENS = 1_500, 0.8, 4_096
MAX_RUNNING = 1_024
"""Sequences that the engine decodes at a time; the others wait."""
REWARD_S = 0.01
"""A group's rewards."""
SUCCESS = 0.6
"""Chance that a completion earns the highest reward. One that is cut has no answer: none."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self.now


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("deadlock: nothing is scheduled and nothing can arrive")
        self._loop.now += timeout
        return super().select(0)


def in_virtual_time(work: Callable[[], Awaitable[Any]]) -> float:
    """Virtual seconds that a coroutine takes."""
    loop = VirtualLoop()
    try:
        loop.run_until_complete(work())
        return loop.now
    finally:
        loop.close()


class EngineModel:
    """Continuous batching as a fluid: every running sequence gains one token per decode step.

    Between admissions and departures the step's length is constant, so a sequence ends when the
    common progress has grown by its length. A cancelled request leaves at once.
    """

    def __init__(self, seed: int, cut: bool) -> None:
        self._seed = seed
        self._cut = cut
        self._drawn: dict[str, int] = {}
        self._progress = 0.0
        self._updated = 0.0
        self._ends: list[tuple[float, int]] = []
        self._running: dict[int, asyncio.Future[None]] = {}
        self._queue: dict[int, tuple[int, asyncio.Future[None]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._count = 0

    async def sample(self, wanted: Sequence[Wanted], then: Then) -> list[StepReturn]:
        """Every group is scored as soon as it is complete."""
        return await one_by_one(wanted, then, self.group)

    async def group(self, wanted: Wanted) -> list[Completion]:
        route = f"{wanted.item.position}/{'refine/0' if wanted.stage == Stage.REFINE else 'draft'}"
        return await together([self._one(route) for _ in range(wanted.next.num_samples)])

    async def _one(self, route: str) -> Completion:
        """The next completion of a route, after the time that it takes to decode.

        Lengths and verdicts are named by (seed, route, number): every variant does the same work.
        """
        number = self._drawn[route] = self._drawn.get(route, 0) + 1
        rng = random.Random(f"{self._seed}/{route}/{number}")
        length, right = draw_length(rng, self._cut), rng.random() < SUCCESS
        await self._decode(length)
        cut = self._cut and length == MAX_TOKENS
        reason = StopReason.LENGTH if cut else StopReason.EOS
        verdict = "right" if right and not cut else "wrong"
        return Completion(f"{verdict} {number}", (0,) * length, (), reason)

    async def _decode(self, length: int) -> None:
        loop = asyncio.get_running_loop()
        self._advance(loop.time())
        self._count += 1
        number, done = self._count, loop.create_future()
        self._queue[number] = (length, done)
        self._admit(loop)
        try:
            await done
        finally:
            self._advance(loop.time())
            self._queue.pop(number, None)
            self._running.pop(number, None)
            self._admit(loop)

    def _advance(self, now: float) -> None:
        step_s = BASE_S + PER_SEQUENCE_S * len(self._running)
        self._progress += (now - self._updated) / step_s
        self._updated = now

    def _admit(self, loop: asyncio.AbstractEventLoop) -> None:
        free = MAX_RUNNING - len(self._running)
        for number in list(itertools.islice(self._queue, free)):
            length, done = self._queue.pop(number)
            self._running[number] = done
            heapq.heappush(self._ends, (self._progress + length, number))
        while self._ends and self._ends[0][1] not in self._running:
            heapq.heappop(self._ends)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if self._ends:
            step_s = BASE_S + PER_SEQUENCE_S * len(self._running)
            rest = max(self._ends[0][0] - self._progress, 0.0)
            self._timer = loop.call_later(rest * step_s, self._finish, loop)

    def _finish(self, loop: asyncio.AbstractEventLoop) -> None:
        self._advance(loop.time())
        while self._ends and self._ends[0][0] <= self._progress + 1e-6:
            _, number = heapq.heappop(self._ends)
            done = self._running.pop(number, None)
            if done is not None and not done.done():
                done.set_result(None)
        self._timer = None
        self._admit(loop)


def draw_length(rng: random.Random, cut: bool) -> int:
    """A length up to the cap. What would be longer is drawn again, or cut there."""
    mu = math.log(MEAN_TOKENS) - SIGMA**2 / 2
    while True:
        length = max(1, round(rng.lognormvariate(mu, SIGMA)))
        if length <= MAX_TOKENS:
            return length
        if cut:
            return MAX_TOKENS


class RewardModel:
    """Scores by text after a fixed delay; q' is as long as it wants to be: prefill is free here."""

    def __init__(self, feedback: BestDraft) -> None:
        self._feedback = feedback

    async def step(self, stage: Stage | None, attempt: Attempt) -> StepReturn:
        await asyncio.sleep(REWARD_S)
        scores = tuple(Score(float(c.text.startswith("right"))) for c in attempt.completions)
        group = Group(
            attempt.problem, stage or Stage.DRAFT, attempt.prompt, attempt.completions, scores
        )
        if stage is not Stage.DRAFT:
            return StepReturn(group, None, (), True)
        selection = self._feedback.select(group, 0)
        assert selection.index is not None
        shown = Prompt(f"q with {attempt.completions[selection.index].text}", (0,))
        following = (NextPrompt(shown, self._feedback.num_refinements),)
        return StepReturn(group, selection, following, False)

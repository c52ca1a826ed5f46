"""Stage 2 that begins while one draft is still running: part of `igrpo.short_circuit=index_order`.

    all drafts but one are done ─> q' of the best so far ─> its refinements begin
    the last is done, or given up ─> the same q': they are kept; another: they are dropped

Exact: the drafts alone decide what is kept, and given their q' the refinements are draws like any
others. What is dropped costs engine time, so nothing begins early on an engine that is busy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from igrpo_nemo.environment import StepReturn
from igrpo_nemo.types import Rollout

BUSY = 128
"""Requests in flight on a shard from which on more of them slow each other down noticeably: about
where a decoding step spends as long on its sequences as on reading the weights."""


@dataclass(slots=True)
class EarlyStarts:
    """How many second stages that began early were kept, and how many were dropped."""

    kept: int = 0
    dropped: int = 0


class EarlyRefinement:
    """The second stage of one problem, begun early or not. To be closed in any case.

    `refine` is Stage 2 behind a draft stage.
    """

    def __init__(
        self, refine: Callable[[StepReturn], Awaitable[Rollout]], starts: EarlyStarts
    ) -> None:
        self._refine = refine
        self._starts = starts
        self._begun: asyncio.Future[StepReturn] | None = None
        self._refining: asyncio.Future[Rollout] | None = None

    def begin(self, drafted: Awaitable[StepReturn]) -> None:
        """Begins Stage 2 behind the drafts so far, once."""
        begun = self._begun = asyncio.ensure_future(drafted)

        async def refining() -> Rollout:
            return await self._refine(await begun)

        self._refining = asyncio.ensure_future(refining())

    async def rollout(self, drafted: StepReturn) -> Rollout:
        """Stage 2 behind the drafts as they turned out."""
        if self._begun is None or self._refining is None:
            return await self._refine(drafted)
        if (await self._begun).observations != drafted.observations:
            self._starts.dropped += 1
            await self.close()
            return await self._refine(drafted)
        self._starts.kept += 1
        early = await self._refining
        return replace(early, drafts=drafted.group, selection=drafted.selection)

    async def close(self) -> None:
        """Gives up what still runs."""
        running: list[asyncio.Future[Any]] = []
        running += [each for each in (self._begun, self._refining) if each is not None]
        for each in running:
            each.cancel()
        await asyncio.gather(*running, return_exceptions=True)

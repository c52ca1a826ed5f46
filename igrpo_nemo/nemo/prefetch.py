"""Fused draft prefetch: the drafts of step k+1 are sampled beside the refinements of step k.

    LookaheadLoader: pulls batch k+1 before it yields batch k; its state is the plain loader's
    Prefetcher:      keeps the drafts made for batch k+1 until the rollout of batch k+1 asks
    roll_out_fused:  the stages of batch k with the drafts of batch k+1 beside Stage 2

On-policy: refinements, their log-probs and ratios come from the current weights, given q'. One
update behind: the drafts, and so the choice of q'. Fresh drafts: the first step of a run, of an
epoch, and after a resume.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from igrpo_nemo.environment import StepReturn
from igrpo_nemo.metrics import prefetch_metrics
from igrpo_nemo.nemo.seam import StepClock
from igrpo_nemo.nemo.stages import (
    Backends,
    Item,
    answer_overlong,
    refine_stage,
    sample_drafts,
    score_drafts,
    together,
)
from igrpo_nemo.types import Completion, Rollout

SEQUENCE_KEY = "igrpo_sequence"
"""The loader's number of a batch, on each of its rows."""


class LookaheadLoader:
    """A data loader that knows its next batch; sequence, state and resume equal the inner loader's.

    Every batch carries a number under `SEQUENCE_KEY`; `upcoming` is the batch behind the one last
    yielded, None at an epoch's end.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._state: dict[str, Any] | None = None
        self._number = 0
        self.upcoming: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self._inner)
        batch = self._numbered(next(iterator, None))
        while batch is not None:
            # The state behind this batch: a resume starts with the one that is pulled next.
            self._state = copy.deepcopy(self._inner.state_dict())
            self.upcoming = self._numbered(next(iterator, None))
            yield batch
            batch = self.upcoming
        # The inner loader's own, which says that the data are used up: a resume begins an epoch.
        self._state = None

    def _numbered(self, batch: Any) -> Any:
        if batch is not None:
            self._number += 1
            batch[SEQUENCE_KEY] = [self._number] * len(batch["message_log"])
        return batch

    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict() if self._state is None else self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = None
        self._inner.load_state_dict(state)


@dataclass(frozen=True, slots=True)
class PrefetchedDrafts:
    """Drafts of a batch, by position, made when `made_at` steps were finished."""

    sequence: int
    problem_ids: tuple[str, ...]
    drafts: tuple[tuple[Completion, ...], ...]
    made_at: int


class Prefetcher:
    """Hands drafts from one rollout to the next, or drops them where they do not fit."""

    def __init__(self, loader: LookaheadLoader, clock: StepClock, total_steps: int) -> None:
        self._loader = loader
        self._clock = clock
        self._total_steps = total_steps
        self._kept: PrefetchedDrafts | None = None
        self.dropped = 0

    def take(self, batch: Any, items: Sequence[Item]) -> PrefetchedDrafts | None:
        """The drafts made for this batch; None where there are none, or others' (counted)."""
        kept, self._kept = self._kept, None
        if kept is None:
            return None
        ids = tuple(item.problem.id for item in items)
        if kept.sequence != _sequence(batch) or kept.problem_ids != ids:
            self.dropped += len(kept.drafts)
            return None
        return kept

    def metrics(
        self, taken: PrefetchedDrafts | None, rollouts: Sequence[Rollout]
    ) -> dict[str, float]:
        """What of this step was prefetched, how many updates ago (0 is fresh), and how good."""
        age = None if taken is None else self._clock.finished - taken.made_at
        return prefetch_metrics(rollouts, [age] * len(rollouts), self.dropped)

    def upcoming(self, batch: Any) -> Any:
        """The batch to draft for beside this batch's refinements; None before the end."""
        following = self._loader.upcoming
        if following is None or self._clock.finished + 1 >= self._total_steps:
            return None
        return following if _sequence(following) == (_sequence(batch) or 0) + 1 else None

    def keep(self, items: Sequence[Item], drafts: Sequence[Sequence[Completion]]) -> None:
        """Keeps the drafts of the upcoming batch for its own rollout."""
        if items:
            self._kept = PrefetchedDrafts(
                sequence=_sequence(self._loader.upcoming) or 0,
                problem_ids=tuple(item.problem.id for item in items),
                drafts=tuple(tuple(each) for each in drafts),
                made_at=self._clock.finished,
            )


async def roll_out_fused(
    items: Sequence[Item],
    on: Backends,
    drafts: Sequence[Sequence[Completion]] | None,
    upcoming: Sequence[Item],
) -> tuple[list[Rollout], list[list[Completion]]]:
    """`stages.roll_out` with `drafts` that were sampled beforehand, or None, and with the drafts of
    the `upcoming` problems, which it returns too.

    The upcoming problem at a position waits for the drafts of this step's problem there.
    """
    ahead: dict[int, list[Completion]] = {}

    async def second_stage(item: Item, drafted: StepReturn | None) -> Rollout:
        if drafted is None:
            return await answer_overlong(item, on)
        return await refine_stage(item, drafted, on)

    async def draft_ahead(position: int) -> None:
        await asyncio.sleep(0)  # this step's refinements ask the engine first
        ahead[position] = await sample_drafts(upcoming[position], on)

    async def problem(item: Item) -> Rollout:
        drafted = None
        if not item.overlong:
            own = await sample_drafts(item, on) if drafts is None else drafts[item.position]
            drafted = await score_drafts(item, own, on)
        beside = [draft_ahead(item.position)] if item.position < len(upcoming) else []
        rollout, *_ = await together([second_stage(item, drafted), *beside])
        return rollout

    rollouts = await together([problem(item) for item in items])
    return rollouts, [ahead[position] for position in sorted(ahead)]


def _sequence(batch: Any) -> int | None:
    numbers = batch.get(SEQUENCE_KEY)
    return None if numbers is None else numbers[0]

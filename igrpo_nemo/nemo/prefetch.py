"""Fused draft prefetch: the drafts of step k+1 are sampled beside the refinements of step k.

    LookaheadLoader: pulls batch k+1 before it yields batch k; its state is the plain loader's
    Prefetcher:      keeps the drafts made for batch k+1 until the rollout of batch k+1 asks

On-policy: refinements, their log-probs and ratios come from the current weights, given q'. One
update behind: the drafts, and so the choice of q'. Fresh drafts: the first step of a run, of an
epoch, and after a resume.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from igrpo_nemo import metrics
from igrpo_nemo.nemo.batches import SEQUENCE_KEY, items_of
from igrpo_nemo.nemo.stages import Item
from igrpo_nemo.types import Completion, Rollout


class StepClock:
    """Training steps finished so far, those before a resume included."""

    def __init__(self, finished: int = 0) -> None:
        self.finished = finished


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

    def staleness(self, taken: PrefetchedDrafts | None) -> int:
        """Updates between drafts and refinements: 0 for fresh drafts."""
        return 0 if taken is None else self._clock.finished - taken.made_at

    def upcoming(self, batch: Any) -> list[Item]:
        """The problems to draft for beside this batch's refinements; none before the end."""
        following = self._loader.upcoming
        if following is None or self._clock.finished + 1 >= self._total_steps:
            return []
        if _sequence(following) != (_sequence(batch) or 0) + 1:
            return []
        return items_of(following, 1)

    def keep(self, items: Sequence[Item], drafts: Sequence[Sequence[Completion]]) -> None:
        """Keeps the drafts of the upcoming batch for its own rollout."""
        if items:
            self._kept = PrefetchedDrafts(
                sequence=_sequence(self._loader.upcoming) or 0,
                problem_ids=tuple(item.problem.id for item in items),
                drafts=tuple(tuple(each) for each in drafts),
                made_at=self._clock.finished,
            )


def prefetch_metrics(
    prefetcher: Prefetcher | None, taken: PrefetchedDrafts | None, rollouts: Sequence[Rollout]
) -> dict[str, float]:
    """What of this step was prefetched, how old it was, and how good; nothing where it is off."""
    if prefetcher is None:
        return {}
    age = None if taken is None else prefetcher.staleness(taken)
    return metrics.prefetch_metrics(rollouts, [age] * len(rollouts), prefetcher.dropped)


def _sequence(batch: Any) -> int | None:
    numbers = batch.get(SEQUENCE_KEY)
    return None if numbers is None else numbers[0]

"""Fused draft prefetch: the drafts of step k+1 are sampled beside the refinements of step k.

    LookaheadLoader: pulls batch k+1 before it yields batch k; its state is the plain loader's
    stages:          the drafts of batch k+1 are sampled beside Stage 2 of batch k
    Prefetcher:      keeps them until the rollout of batch k+1 asks

On-policy: refinements, their log-probs and ratios come from the current weights, given q'. One
update behind: the drafts, and so the choice of q'. Fresh drafts: the first step of a run, of an
epoch, and after a resume.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from igrpo_nemo.metrics import prefetch_metrics
from igrpo_nemo.nemo.seam import StepClock
from igrpo_nemo.nemo.stages import Drafts
from igrpo_nemo.types import Rollout

BATCH_NUMBER = "igrpo_sequence"
"""Key: the loader's number of a batch, on each of its rows."""


class LookaheadLoader:
    """A data loader that knows its next batch; sequence, state and resume equal the inner loader's.

    Every batch carries a number under `BATCH_NUMBER`; `upcoming` is the batch behind the one last
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
            batch[BATCH_NUMBER] = [self._number] * len(batch["message_log"])
        return batch

    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict() if self._state is None else self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = None
        self._inner.load_state_dict(state)


class Prefetcher:
    """Hands drafts from one rollout to the next, or drops them where they do not fit."""

    def __init__(self, loader: LookaheadLoader, clock: StepClock, total_steps: int) -> None:
        self._loader = loader
        self._clock = clock
        self._total_steps = total_steps
        self._kept: tuple[int, Drafts, int] | None = None  # batch, drafts by position, made when
        self._age: int | None = None
        self.dropped = 0

    def take(self, batch: Any) -> Drafts | None:
        """The drafts made for this batch; None where there are none, or another's (counted)."""
        kept, self._kept, self._age = self._kept, None, None
        if kept is None:
            return None
        number, drafts, made_at = kept
        if number != number_of(batch):
            self.dropped += len(drafts)
            return None
        self._age = self._clock.finished - made_at
        return drafts

    def upcoming(self, batch: Any) -> Any:
        """The batch to draft for beside this batch's refinements; None before the end."""
        following = self._loader.upcoming
        if following is None or self._clock.finished + 1 >= self._total_steps:
            return None
        return following if number_of(following) == number_of(batch) + 1 else None

    def keep(self, drafts: Drafts, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Keeps the drafts of the upcoming batch for its own rollout. What of this one was taken,
        how many updates ago it was made (0 is fresh), and how good it is."""
        if drafts:
            self._kept = number_of(self._loader.upcoming), drafts, self._clock.finished
        return prefetch_metrics(rollouts, [self._age] * len(rollouts), self.dropped)


def number_of(batch: Any) -> int:
    """The loader's number of a batch."""
    return batch[BATCH_NUMBER][0]

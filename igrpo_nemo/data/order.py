"""The order in which an epoch's problems are trained on.

A permutation per (seed, epoch), so that a position (epoch, index) is all that a resume needs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Position:
    """The next problem to hand out: `index` counts from 0 in the order of `epoch`."""

    epoch: int = 0
    index: int = 0


class EpochOrder:
    """Hands out problem numbers in batches; the last partial batch of an epoch is dropped.

    Raises ValueError where there are fewer problems than one batch.
    """

    def __init__(
        self, num_problems: int, *, batch_size: int, seed: int, shuffle: bool = True
    ) -> None:
        if num_problems < batch_size:
            raise ValueError(f"{num_problems} problems do not make a batch of {batch_size}")
        self.num_problems = num_problems
        self.batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._epoch, self._order = -1, list[int]()

    def order(self, epoch: int) -> list[int]:
        """All problem numbers in the order of an epoch (counted from 0)."""
        if epoch != self._epoch:
            order = list(range(self.num_problems))
            if self._shuffle:
                random.Random(f"{self._seed}/epoch/{epoch}").shuffle(order)
            self._epoch, self._order = epoch, order
        return self._order

    def take(self, position: Position) -> tuple[list[int], Position]:
        """The batch at a position, and the position behind it."""
        if position.index + self.batch_size > self.num_problems:
            position = Position(position.epoch + 1, 0)
        end = position.index + self.batch_size
        return self.order(position.epoch)[position.index : end], Position(position.epoch, end)

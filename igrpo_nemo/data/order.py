"""Which problems are trained on, and in which order.

    several sets --mixed--> problems --EpochOrder, a permutation per (seed, epoch)--> batches

A position (epoch, index) is all that a resume needs; with a curriculum, what it has measured too.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from igrpo_nemo.types import Problem, Rollout


@dataclass(frozen=True, slots=True)
class Position:
    """The next problem to hand out: `index` counts from 0 in the order of `epoch`."""

    epoch: int = 0
    index: int = 0


class EpochOrder:
    """Hands out problem numbers in batches; the last partial batch of an epoch is dropped.

    What a run measures changes nothing here: that is the `Curriculum`'s part. Raises ValueError
    where there are fewer problems than one batch.
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
        """The problem numbers of an epoch (counted from 0) in their order."""
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._ordered(epoch)
        return self._order

    def take(self, position: Position) -> tuple[list[int], Position]:
        """The batch at a position, and the position behind it."""
        if position.index + self.batch_size > len(self.order(position.epoch)):
            position = Position(position.epoch + 1, 0)
        end = position.index + self.batch_size
        return self.order(position.epoch)[position.index : end], Position(position.epoch, end)

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """What a step has sampled."""

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs beside the position, as plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """`state` may be empty: of a run that measured nothing."""

    def _ordered(self, epoch: int) -> list[int]:
        order = list(range(self.num_problems))
        if self._shuffle:
            random.Random(f"{self._seed}/epoch/{epoch}").shuffle(order)
        return order


class Curriculum(EpochOrder):
    """Leaves out of an epoch what was always or never solved when it was last sampled.

    `keep` is the share of such problems that an epoch has all the same, chosen by the seed: 0 drops
    them; an epoch has a batch at least.
    What an epoch leaves out is decided where it begins and is part of the state, so a resume goes
    on in the same order.
    """

    def __init__(self, ids: Sequence[str], *, keep: float, **order: Any) -> None:
        super().__init__(len(ids), **order)
        self._ids, self._keep = ids, keep
        self._rates: dict[str, float] = {}
        self._decided, self._left_out = 0, frozenset[int]()

    def add(self, rollouts: Sequence[Rollout]) -> None:
        self.add_rates(solve_rates(rollouts))

    def add_rates(self, rates: Mapping[str, float]) -> None:
        """What a step has measured, by the problem's id."""
        self._rates.update(rates)

    def metrics(self) -> dict[str, float]:
        """Shares of the problems: left out of this epoch; always and never solved, of those that
        were measured."""
        measured = list(self._rates.values()) or [0.5]
        return {
            "data/left_out": len(self._left_out) / len(self._ids),
            "data/always_solved": measured.count(1.0) / len(measured),
            "data/never_solved": measured.count(0.0) / len(measured),
        }

    def state_dict(self) -> dict[str, Any]:
        left_out = sorted(self._left_out)
        return {"rates": dict(self._rates), "epoch": self._decided, "left_out": left_out}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            self._rates, self._decided = dict(state["rates"]), state["epoch"]
            self._left_out = frozenset(state["left_out"])

    def _ordered(self, epoch: int) -> list[int]:
        order = super()._ordered(epoch)
        if epoch != self._decided:
            rng = random.Random(f"{self._seed}/curriculum/{epoch}")
            ends = [n for n in order if self._rates.get(self._ids[n]) in (0.0, 1.0)]
            left_out = [n for n in ends if rng.random() >= self._keep]
            self._decided = epoch
            self._left_out = frozenset(left_out[: len(order) - self.batch_size])
        return [n for n in order if n not in self._left_out]


def solve_rates(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The share of right answers to q, by the problem's id."""
    drafts = {rollout.problem.id: rollout.drafts.scores for rollout in rollouts}
    return {
        id: sum(s.correct for s in scores) / len(scores) for id, scores in drafts.items() if scores
    }


def mixed(
    sets: Sequence[Sequence[Problem]], weights: Sequence[float] | None, *, seed: int
) -> list[Problem]:
    """As many problems as all sets have together, each set's share in proportion to its weight.

    A set that has more problems than its share gives a seeded choice of them, one that has fewer
    gives some several times. Without weights all problems are taken once. Ids stay different: what
    comes again under an id is `<id>#2`, `<id>#3`, ...
    """
    sizes = [len(problems) for problems in sets]
    shares = sizes if weights is None else _shares(sum(sizes), weights)
    chosen: list[Problem] = []
    for number, (problems, share) in enumerate(zip(sets, shares, strict=True)):
        whole, rest = divmod(share, len(problems))
        some = random.Random(f"{seed}/mixture/{number}").sample(range(len(problems)), rest)
        chosen += [*problems] * whole + [problems[index] for index in sorted(some)]
    seen: Counter[str] = Counter()
    different: list[Problem] = []
    for problem in chosen:
        seen[problem.id] += 1
        count = seen[problem.id]
        different.append(problem if count == 1 else replace(problem, id=f"{problem.id}#{count}"))
    return different


def _shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole parts proportional to the weights; the largest remainders are rounded up."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda n: shares[n] - exact[n])
    for number in by_remainder[: total - sum(shares)]:
        shares[number] += 1
    return shares

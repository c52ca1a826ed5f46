"""Chained arithmetic: `7+5*3-4...` is worked left to right and only last digits are kept.

Multiplication is by 3, 7 or 9, so every step is a bijection of the digits and one slip spoils what
follows. The answer is the chain's last two results, which leaves a guess one chance in a hundred.

    arithmetic   six operations: a draft is right or wrong, and can be mended step by step
    long_chain   half of the chains are longer than a completion has room for: a draft that was cut
                 off can be continued
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from igrpo_nemo.tasks.task import Task, WorkedAnswer

MULTIPLIERS = (3, 7, 9)


@dataclass(frozen=True, slots=True)
class Chain:
    """A start digit and the operations that follow, as (operator, digit)."""

    start: int
    operations: tuple[tuple[str, int], ...]

    @property
    def question(self) -> str:
        return f"{self.start}" + "".join(f"{op}{digit}" for op, digit in self.operations) + "="

    @property
    def results(self) -> tuple[int, ...]:
        """The last digit after each operation."""
        value, results = self.start, []
        for op, digit in self.operations:
            value = apply(value, op, digit)
            results.append(value)
        return tuple(results)

    @property
    def answer(self) -> str:
        return answer_of(self.results)


def apply(value: int, op: str, digit: int) -> int:
    """The last digit of `value op digit`."""
    return {"+": value + digit, "-": value - digit, "*": value * digit}[op] % 10


def answer_of(results: Sequence[int]) -> str:
    """The answer that a chain of results leads to: its last two digits."""
    return "".join(map(str, results[-2:]))


def digits(results: Sequence[int]) -> tuple[str, ...]:
    return tuple(map(str, results))


def solution_of(results: Sequence[int]) -> WorkedAnswer:
    """One result each, and the answer that they lead to."""
    return WorkedAnswer(digits(results), answer_of(results))


@dataclass(frozen=True)
class ChainTask(Task):
    """`fixed_error_share` of the table (value, operator, digit) has a fixed wrong digit, given with
    `fixed_error_rate`; other entries slip with `slip`. Under a draft, a right result is kept with
    `trust` and a wrong one mended with `mend`.
    """

    fixed_error_share: float = 0.3
    fixed_error_rate: float = 0.7
    slip: float = 0.03
    trust: float = 0.95
    mend: float = 0.8

    def sample(self, rng: random.Random, size: int) -> Chain:
        """A chain of `size` operations with uniformly drawn operators and digits."""
        operations = []
        for _ in range(size):
            op = rng.choice("+-*")
            operations.append((op, rng.choice(MULTIPLIERS) if op == "*" else rng.randint(1, 9)))
        return Chain(rng.randint(0, 9), tuple(operations))

    def right(self, exercise: Chain) -> WorkedAnswer:
        return solution_of(exercise.results)

    def attempt(self, exercise: Chain, rng: random.Random) -> WorkedAnswer:
        return solution_of(self._results(exercise.start, exercise.operations, rng))

    def correct(self, exercise: Chain, draft: WorkedAnswer, rng: random.Random) -> WorkedAnswer:
        """Step by step, whatever the corrected steps lead to."""
        return solution_of(self._mended(exercise.results, draft.steps, rng))

    def _mended(self, right: Sequence[int], stated: Sequence[str], rng: random.Random) -> list[int]:
        mended = []
        for digit, said in zip(right, map(int, stated), strict=True):
            if said == digit:
                mended.append(digit if rng.random() < self.trust else other(digit, rng))
            else:
                mended.append(digit if rng.random() < self.mend else said)
        return mended

    def _results(
        self, value: int, operations: Sequence[tuple[str, int]], rng: random.Random
    ) -> list[int]:
        results = []
        for op, digit in operations:
            value = self._result(value, op, digit, rng)
            results.append(value)
        return results

    def _result(self, value: int, op: str, digit: int, rng: random.Random) -> int:
        right = apply(value, op, digit)
        entry = random.Random(f"{self.seed}/{value}{op}{digit}")
        if entry.random() < self.fixed_error_share:
            wrong = other(right, entry)
            return wrong if rng.random() < self.fixed_error_rate else right
        return other(right, rng) if rng.random() < self.slip else right


@dataclass(frozen=True)
class LongChainTask(ChainTask):
    """A completion has room for `room` results, or for six fewer and the answer. Longer drafts are
    cut off, and those are continued where they stop, taken as right."""

    fixed_error_share: float = 0.05
    slip: float = 0.02
    room: int = 12

    def draft(self, exercise: Chain, rng: random.Random) -> WorkedAnswer:
        whole = super().draft(exercise, rng)
        if len(whole.steps) <= self.room - 6:
            return whole
        return WorkedAnswer(whole.steps[: self.room], None)

    def correct(self, exercise: Chain, draft: WorkedAnswer, rng: random.Random) -> WorkedAnswer:
        if draft.answer is not None:
            return super().correct(exercise, draft, rng)
        *_, before, last = map(int, draft.steps)
        rest = self._results(last, exercise.operations[len(draft.steps) :], rng)
        return WorkedAnswer(digits(rest), answer_of([before, last, *rest]))


def other(digit: int, rng: random.Random) -> int:
    """Any other digit."""
    return (digit + rng.randint(1, 9)) % 10

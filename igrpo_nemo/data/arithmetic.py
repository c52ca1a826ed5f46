"""Chained arithmetic: a task small enough to learn on a laptop, hard enough to fail at.

`7+5*3-4...` is worked left to right and only last digits are kept. Multiplication is by 3, 7 or 9,
so every step is a bijection of the digits and one slip spoils what follows. The answer is the
chain's last two results, which leaves a guess one chance in a hundred.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from igrpo_nemo.types import Problem

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


def sample_chain(rng: random.Random, length: int) -> Chain:
    """A chain of `length` operations with uniformly drawn operators and digits."""
    operations = []
    for _ in range(length):
        op = rng.choice("+-*")
        operations.append((op, rng.choice(MULTIPLIERS) if op == "*" else rng.randint(1, 9)))
    return Chain(rng.randint(0, 9), tuple(operations))


def arithmetic_problems(
    count: int, *, lengths: Sequence[int], seed: int, split: str
) -> list[Problem]:
    """`count` different problems; `split` keeps training and validation problems apart.

    A chain belongs to the validation split when the digest of its question says so, hence the
    splits are disjoint whatever their sizes and seeds. Raises ValueError where `lengths` allow too
    few different chains.
    """
    rng = random.Random(f"{seed}/{split}")
    problems: dict[str, Problem] = {}
    for _ in range(50 * count + 1000):
        if len(problems) == count:
            return list(problems.values())
        chain = sample_chain(rng, rng.choice(list(lengths)))
        question = chain.question
        if is_validation(question) == (split == "validation"):
            problems[question] = Problem(f"{split}-{question}", question, chain.answer)
    raise ValueError(f"chains of {list(lengths)} operations give fewer than {count} problems")


def is_validation(question: str) -> bool:
    """Whether a question is held out; about one in five is."""
    return random.Random(question).random() < 0.2

"""Written solutions of chained arithmetic by a demonstrator who errs in a known way.

A share of the table (value, operator, digit) -> result is answered by a fixed wrong digit most of
the time; everything else slips now and then. A model that imitates this demonstrator starts at a
middling success rate which reinforcement can raise. With a draft before it, the demonstrator keeps
right results, mends wrong ones, and does neither reliably.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from igrpo_nemo.data.arithmetic import Chain, answer_of, apply


@dataclass(frozen=True, slots=True)
class Demonstrator:
    """How the demonstrator errs; all but `seed` are probabilities.

    `fixed_error_share` of the table has a fixed wrong digit, given with `fixed_error_rate`; other
    entries slip with `slip`. Under a draft, a right result is kept with `trust` and a wrong one
    mended with `mend`. `broken_format` of the solutions break the answer format.
    """

    seed: int = 0
    fixed_error_share: float = 0.3
    fixed_error_rate: float = 0.7
    slip: float = 0.03
    trust: float = 0.95
    mend: float = 0.8
    right_draft_share: float = 0.3
    broken_format: float = 0.05

    def solve(self, chain: Chain, rng: random.Random) -> str:
        """A solution of the bare problem."""
        return self._write(self._solve(chain, rng), rng)

    def draft(self, chain: Chain, rng: random.Random) -> tuple[str, tuple[int, ...]]:
        """A draft to correct, and the results it states."""
        if rng.random() < self.right_draft_share:
            results = chain.results
        else:
            results = tuple(self._solve(chain, rng))
        return solution_text(results), results

    def correct(self, chain: Chain, drafted: tuple[int, ...], rng: random.Random) -> str:
        """A correction of a draft's results, step by step."""
        results = []
        for right, stated in zip(chain.results, drafted, strict=True):
            if stated == right:
                results.append(right if rng.random() < self.trust else _other(right, rng))
            else:
                results.append(right if rng.random() < self.mend else stated)
        return self._write(results, rng)

    def judge(
        self, chain: Chain, drafted: tuple[int, ...], words: tuple[str, ...], rng: random.Random
    ) -> str:
        """A verdict on a draft's answer after an own solution: the first of the two words where
        the answers agree, the other one where they do not."""
        results = self._solve(chain, rng)
        word = words[answer_of(results) != answer_of(drafted)]
        return f"<think>{''.join(map(str, results))}</think><answer>{word}</answer>"

    def _solve(self, chain: Chain, rng: random.Random) -> list[int]:
        value, results = chain.start, []
        for op, digit in chain.operations:
            value = self._result(value, op, digit, rng)
            results.append(value)
        return results

    def _result(self, value: int, op: str, digit: int, rng: random.Random) -> int:
        right = apply(value, op, digit)
        entry = random.Random(f"{self.seed}/{value}{op}{digit}")
        if entry.random() < self.fixed_error_share:
            wrong = _other(right, entry)
            return wrong if rng.random() < self.fixed_error_rate else right
        return _other(right, rng) if rng.random() < self.slip else right

    def _write(self, results: list[int], rng: random.Random) -> str:
        text = solution_text(results)
        if rng.random() >= self.broken_format:
            return text
        broken_tag = rng.choice(("<think>", "</think>", "<answer>", "</answer>"))
        return text.replace(broken_tag, "")


def solution_text(results: tuple[int, ...] | list[int]) -> str:
    """The format that the prompt asks for: reasoning in `<think>`, the result in `<answer>`."""
    reasoning = "".join(map(str, results))
    return f"<think>{reasoning}</think><answer>{answer_of(results)}</answer>"


def _other(digit: int, rng: random.Random) -> int:
    return (digit + rng.randint(1, 9)) % 10

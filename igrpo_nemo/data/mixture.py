"""One list of training problems out of several sets, in shares that their weights say."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from igrpo_nemo.types import Problem


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

"""Stage 1 that ends when the best draft is known: `igrpo.short_circuit`, the same for every engine.

A draft at the known maximum reward cannot be beaten. With `index_order` it ends Stage 1 once every
draft before it is done, which is exactly the arg max with first-index ties; with `first` it ends
Stage 1 at once, which favours short drafts. Drafts that still run are given up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from igrpo_nemo.types import Completion, Score


@dataclass(frozen=True, slots=True)
class ShortCircuit:
    """`best_reward` is the highest reward that a draft can have.

    `finished_only`: a truncated draft does not end Stage 1, because a finished one of equal reward
    is preferred (`igrpo.rank_truncated_last`).
    """

    mode: Literal["off", "index_order", "first"] = "off"
    best_reward: float = 0.0
    finished_only: bool = True

    @property
    def enabled(self) -> bool:
        return self.mode != "off"

    def unbeatable(self, completion: Completion, score: Score) -> bool:
        """Whether no other draft can rank above this one."""
        if self.finished_only and completion.truncated:
            return False
        return score.reward >= self.best_reward

    def given_up(self, unbeatable: Sequence[bool | None]) -> list[int]:
        """The drafts of a group, by index, that run and no longer matter.

        `unbeatable[i]` is None while draft i runs or has no score yet. A draft behind an
        unbeatable one loses every tie against it; Stage 1 is over when no other draft runs.
        """
        if True not in unbeatable:
            return []
        start = 0 if self.mode == "first" else unbeatable.index(True) + 1
        return [i for i in range(start, len(unbeatable)) if unbeatable[i] is None]

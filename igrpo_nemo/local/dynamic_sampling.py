"""DAPO's dynamic sampling: redraw until enough trained groups carry an advantage.

Groups whose rewards are all equal have zero advantage and teach nothing (arXiv 2503.14476, section
3.2). With two stages the filter looks at the groups that are trained, and a redraw takes new
problems through both stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from igrpo_nemo.errors import UserError
from igrpo_nemo.objectives.reward_shaping import nonzero_groups
from igrpo_nemo.types import Rollout, TrainingRow


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step is trained on, and everything that was rolled out for it."""

    rollouts: list[Rollout]
    rows: list[TrainingRow]
    sampled: list[Rollout]
    draws: int = 1


def has_advantage(rows: Sequence[TrainingRow]) -> bool:
    """Whether any group among the rows has rewards that differ."""
    return any(nonzero_groups([r.reward for r in rows], [r.group for r in rows]).values())


def collect_groups(
    *,
    wanted: int,
    max_draws: int,
    roll_out: Callable[[int], list[Rollout]],
    training_rows: Callable[[Rollout], list[TrainingRow]],
) -> Batch:
    """Draws batches until `wanted` problems have an advantage, and keeps the first of them.

    `roll_out(draw)` rolls the next batch out. `training_rows` returns a rollout's rows with their
    unshaped rewards: like NeMo-RL, the filter looks at the task and not at length penalties. Raises
    `UserError` after `max_draws` batches (`grpo.dynamic_sampling_max_gen_batches`).
    """
    kept: list[Rollout] = []
    rows: list[TrainingRow] = []
    sampled: list[Rollout] = []
    for draw in range(max_draws):
        for rollout in roll_out(draw):
            sampled.append(rollout)
            candidate = training_rows(rollout)
            if len(kept) < wanted and has_advantage(candidate):
                kept.append(rollout)
                rows += candidate
        if len(kept) == wanted:
            return Batch(kept, rows, sampled, draw + 1)
    raise UserError(
        f"dynamic sampling found {len(kept)} of {wanted} groups with an advantage in {max_draws} "
        "batches: raise grpo.dynamic_sampling_max_gen_batches, or choose problems that the policy "
        "sometimes solves and sometimes fails"
    )

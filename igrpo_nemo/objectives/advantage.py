"""Group-relative advantages (paper section 3.1 and Eq. 4).

    rewards, groups -> one advantage per row, shared by all tokens of its completion

Shapes: R rows (trained completions), G rows of one group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from igrpo_nemo.objectives.reward_shaping import rewards_differ


def group_advantages(
    rewards_R: Tensor,
    groups_R: Sequence[str],
    *,
    normalize_rewards: bool = True,
    use_leave_one_out_baseline: bool = False,
    delta: float = 1e-6,
) -> Tensor:
    """A_j = (R_j - mean) / (std + delta) over the rows with the same group (Eq. 4).

    std is the sample standard deviation (divisor G - 1). A group with equal rewards gets
    advantages of exactly 0 (the paper's convention for std = 0), also where the mean of equal
    rewards is not itself representable. delta = 0 is Eq. 4 to the letter; NeMo-RL adds 1e-6.

    `normalize_rewards=False` gives Dr. GRPO's R_j - mean (arXiv 2503.20783).
    `use_leave_one_out_baseline=True` takes mean and std over the *other* rows of the group (RLOO,
    arXiv 2402.14740). Where those do not vary, the difference stays undivided, as in NeMo-RL.

    `rewards_R` is of any float dtype and device; the arithmetic is in float64 on the host. Rows of
    a group need not be neighbours. Returns advantages_R, without gradient, like the rewards.
    Raises ValueError for a group of one row and a reward that is not finite.
    """
    rewards_R = rewards_R.detach()
    exact_R = rewards_R.to(device="cpu", dtype=torch.float64)
    advantages_R = torch.zeros_like(exact_R)
    rows_of: dict[str, list[int]] = {}
    for row, (label, reward) in enumerate(zip(groups_R, exact_R.tolist(), strict=True)):
        rows_of.setdefault(label, []).append(row)
        if not math.isfinite(reward):
            raise ValueError(f"the reward of row {row} is {reward}: it must be finite")
    for label, rows in rows_of.items():
        if len(rows) < 2:
            raise ValueError(
                f"group {label!r} has a single row: advantages are relative to the group, "
                "so every group needs at least 2 completions"
            )
        rewards_G = exact_R[rows]
        if not rewards_differ(rewards_G.tolist()):
            continue
        mean, std_G = (
            _leave_one_out_mean_std(rewards_G)
            if use_leave_one_out_baseline
            else (rewards_G.mean(), rewards_G.std().expand_as(rewards_G))
        )
        difference_G = rewards_G - mean
        if normalize_rewards:
            difference_G = torch.where(std_G > 0, difference_G / (std_G + delta), difference_G)
        advantages_R[rows] = difference_G
    return advantages_R.to(rewards_R)


def _leave_one_out_mean_std(rewards_G: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sample std of the other rows, for each row; std is 0 where those do not vary."""
    size = rewards_G.shape[0]
    is_other_GG = ~torch.eye(size, dtype=torch.bool)
    others_GG = rewards_G.expand(size, size)[is_other_GG].view(size, size - 1)
    varies_G = torch.tensor([rewards_differ(others) for others in others_GG.tolist()])
    std_G = others_GG.std(dim=1) if size > 2 else torch.zeros_like(rewards_G)
    return others_GG.mean(dim=1), torch.where(varies_G, std_G, 0.0)

"""Group-relative advantages (paper section 3.1 and Eq. 4).

    rewards, groups -> one advantage per row, shared by all tokens of its completion

Shapes: R rows (trained completions), G rows of one group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from igrpo_nemo.objectives.reward_shaping import rewards_differ


def group_advantages(
    rewards_R: Tensor,
    groups_R: Sequence[str] | Tensor,
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

    Args:
        rewards_R: any dtype and device; the arithmetic is in float64 on the host.
        groups_R: a label per row; rows of a group need not be neighbours.

    Returns: advantages_R, without gradient, in the dtype of the rewards (default float dtype for
        integer rewards), on their device.

    Raises ValueError for a group of one row, a reward that is not finite, a negative delta, or
        shapes that do not agree.
    """
    if delta < 0:
        raise ValueError(f"delta={delta} must not be negative")
    rows_of_group = _rows_of_groups(rewards_R, groups_R)
    exact_R = rewards_R.detach().to(device="cpu", dtype=torch.float64)
    finite_R = torch.isfinite(exact_R)
    if not bool(finite_R.all()):
        row = int((~finite_R).nonzero()[0])
        raise ValueError(f"the reward of row {row} is {float(exact_R[row])}: it must be finite")
    advantages_R = torch.zeros_like(exact_R)
    for rows in rows_of_group:
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
    dtype = rewards_R.dtype if rewards_R.is_floating_point() else torch.get_default_dtype()
    return advantages_R.to(device=rewards_R.device, dtype=dtype)


def _rows_of_groups(rewards_R: Tensor, groups_R: Sequence[str] | Tensor) -> list[list[int]]:
    """The row numbers of each group, after the checks that need only the labels."""
    labels = groups_R.tolist() if isinstance(groups_R, Tensor) else list(groups_R)
    if rewards_R.ndim != 1 or len(labels) != rewards_R.shape[0]:
        raise ValueError(
            f"rewards of shape {tuple(rewards_R.shape)} do not fit {len(labels)} group labels"
        )
    rows_of: dict[object, list[int]] = {}
    for row, label in enumerate(labels):
        rows_of.setdefault(label, []).append(row)
    for label, rows in rows_of.items():
        if len(rows) < 2:
            raise ValueError(
                f"group {label!r} has a single row: advantages are relative to the group, "
                "so every group needs at least 2 completions"
            )
    return list(rows_of.values())


def _leave_one_out_mean_std(rewards_G: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sample std of the other rows, for each row; std is 0 where those do not vary."""
    size = rewards_G.shape[0]
    is_other_GG = ~torch.eye(size, dtype=torch.bool)
    others_GG = rewards_G.expand(size, size)[is_other_GG].view(size, size - 1)
    varies_G = torch.tensor([rewards_differ(others) for others in others_GG.tolist()])
    std_G = others_GG.std(dim=1) if size > 2 else torch.zeros_like(rewards_G)
    return others_GG.mean(dim=1), torch.where(varies_G, std_G, 0.0)

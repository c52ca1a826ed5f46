"""Rewards between the scorer and the advantage: scaling, length punishment, informative groups.

    rewards -> scale_rewards -> + overlong_penalties -> group_advantages
               nonzero_groups: which groups have a gradient at all (DAPO's dynamic sampling)

Plain Python on floats; the keyword names are NeMo-RL's keys under `grpo.reward_scaling` and
`grpo.reward_shaping`. Sources: DAPO (arXiv 2503.14476), Eqs. 11 and 13.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

Label = TypeVar("Label", bound=Hashable)

EQUAL_REWARDS = 1e-6
"""Rewards whose spread is below this share of their magnitude are equal: they differ by rounding.

The same reward summed in another order, or kept in fp32, may differ in its last digits. Without a
tolerance the zero-std convention of Eq. 4 fails there, and with delta = 0 such a group would get
advantages of size 1 out of noise.
"""


def rewards_differ(rewards: Sequence[float]) -> bool:
    """Whether a group's rewards say anything: false for one reward, or for equal ones."""
    if len(rewards) < 2:
        return False
    low, high = min(rewards), max(rewards)
    return high - low > EQUAL_REWARDS * max(abs(low), abs(high))


def nonzero_groups(rewards_R: Iterable[float], groups_R: Iterable[Label]) -> dict[Label, bool]:
    """For each group, in order of first appearance, whether its advantages are non-zero.

    DAPO keeps only the groups marked true and samples again for the rest (arXiv 2503.14476,
    Eq. 11). Rows of a group need not be neighbours.

    Raises ValueError when the two have different lengths.
    """
    rewards_of: dict[Label, list[float]] = {}
    for reward, group in zip(rewards_R, groups_R, strict=True):
        rewards_of.setdefault(group, []).append(float(reward))
    return {group: rewards_differ(rewards) for group, rewards in rewards_of.items()}


def scale_rewards(
    rewards: Sequence[float],
    *,
    source_min: float = 0.0,
    source_max: float = 1.0,
    target_min: float = 0.0,
    target_max: float = 1.0,
) -> list[float]:
    """Map [source_min, source_max] linearly onto [target_min, target_max] (`grpo.reward_scaling`).

    A reward outside the source range is moved to its nearest end first, as in NeMo-RL.
    Accuracy + format needs source_max = 2.
    """
    slope = (target_max - target_min) / (source_max - source_min)
    return [
        target_min + (min(max(reward, source_min), source_max) - source_min) * slope
        for reward in rewards
    ]


def overlong_penalties(
    lengths: Sequence[int],
    *,
    max_response_length: int,
    overlong_buffer_length: int,
    overlong_buffer_penalty: float = 1.0,
) -> list[float]:
    """What to add to the reward of a completion of this many tokens: DAPO's soft punishment.

    0 up to max_response_length - overlong_buffer_length tokens, from there linearly down to
    -overlong_buffer_penalty at max_response_length, and no lower (arXiv 2503.14476, Eq. 13).
    NeMo-RL lets the line run on beyond max_response_length, where a completion cannot be as long
    as the token limit equals that key.
    """
    free_length = max_response_length - overlong_buffer_length
    return [
        -overlong_buffer_penalty
        * min(max((length - free_length) / overlong_buffer_length, 0.0), 1.0)
        for length in lengths
    ]

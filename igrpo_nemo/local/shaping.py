"""The rewards that the objective sees: NeMo-RL's scaling and shaping, applied to training rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from igrpo_nemo.config.nemo_keys import RewardScaling, RewardShaping
from igrpo_nemo.objectives.reward_shaping import overlong_penalties, scale_rewards
from igrpo_nemo.types import TrainingRow


def shape_rows(
    rows: Sequence[TrainingRow], scaling: RewardScaling, shaping: RewardShaping
) -> list[TrainingRow]:
    """Rows with scaled, then shaped rewards; unchanged where both are off.

    `stop_properly_penalty_coef` multiplies the reward of truncated completions and replaces the
    overlong penalty, as in NeMo-RL (nemo_rl/algorithms/reward_functions.py).
    """
    rewards = [row.reward for row in rows]
    if scaling.enabled:
        rewards = scale_rewards(
            rewards,
            source_min=scaling.source_min,
            source_max=scaling.source_max,
            target_min=scaling.target_min,
            target_max=scaling.target_max,
        )
    if shaping.enabled and shaping.stop_properly_penalty_coef is not None:
        coef = shaping.stop_properly_penalty_coef
        rewards = [
            reward * coef if row.completion.truncated else reward
            for row, reward in zip(rows, rewards, strict=True)
        ]
    elif shaping.enabled and shaping.max_response_length is not None:
        penalties = overlong_penalties(
            [len(row.completion.token_ids) for row in rows],
            max_response_length=shaping.max_response_length,
            overlong_buffer_length=shaping.overlong_buffer_length,
            overlong_buffer_penalty=shaping.overlong_buffer_penalty,
        )
        rewards = [r + p for r, p in zip(rewards, penalties, strict=True)]
    return [replace(row, reward=reward) for row, reward in zip(rows, rewards, strict=True)]

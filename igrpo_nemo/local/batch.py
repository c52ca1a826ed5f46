"""What a step is trained on: the rollouts that are kept, their rows, the rewards these are given.

    draws -> kept: all of the one draw; with dynamic sampling the groups that carry an advantage
          -> training rows -> shape_rows: NeMo-RL's scaling and penalties

Groups whose rewards are all equal have zero advantage and teach nothing (DAPO, arXiv 2503.14476,
section 3.2). With two stages the filter looks at the groups that are trained, and a redraw takes
new problems through both stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from igrpo_nemo.config.nemo_keys import GRPO
from igrpo_nemo.data.order import Position
from igrpo_nemo.errors import UserError
from igrpo_nemo.objectives.reward_shaping import nonzero_groups, overlong_penalties, scale_rewards
from igrpo_nemo.types import Rollout, TrainingRow

RowsOf = Callable[[Rollout], list[TrainingRow]]


@dataclass(frozen=True, slots=True)
class Draw:
    """Problems rolled out together, and the position in the data behind them."""

    rollouts: list[Rollout]
    behind: Position


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step is trained on, and everything that was rolled out for it."""

    rollouts: list[Rollout]
    rows: list[TrainingRow]
    sampled: list[Rollout]
    behind: Position
    draws: int = 1


def collect_batch(draws: Iterator[Draw], grpo: GRPO, training_rows: RowsOf) -> Batch | None:
    """The batch of one step, of one draw or, with dynamic sampling, of as many as it takes.

    None where the draws end before the batch is complete: all epochs are over. Raises `UserError`
    after `grpo.dynamic_sampling_max_gen_batches` draws.
    """
    if grpo.use_dynamic_sampling:
        return _collect_groups(draws, grpo, training_rows)
    for draw in draws:
        rows = [row for rollout in draw.rollouts for row in training_rows(rollout)]
        return Batch(draw.rollouts, rows, draw.rollouts, draw.behind)
    return None


def _collect_groups(draws: Iterator[Draw], grpo: GRPO, training_rows: RowsOf) -> Batch | None:
    """Draws until `grpo.num_prompts_per_step` problems have an advantage; keeps the first of them.

    Like NeMo-RL, the filter looks at the task's rewards and not at length penalties.
    """
    wanted, limit = grpo.num_prompts_per_step, grpo.dynamic_sampling_max_gen_batches
    kept: list[Rollout] = []
    rows: list[TrainingRow] = []
    sampled: list[Rollout] = []
    count = 0
    for count, draw in enumerate(islice(draws, limit), start=1):
        for rollout in draw.rollouts:
            sampled.append(rollout)
            candidate = training_rows(rollout)
            if len(kept) < wanted and _has_advantage(candidate):
                kept.append(rollout)
                rows += candidate
        if len(kept) == wanted:
            return Batch(kept, rows, sampled, draw.behind, count)
    if count < limit:
        return None
    raise UserError(
        f"dynamic sampling found {len(kept)} of {wanted} groups with an advantage in {limit} "
        "batches: raise grpo.dynamic_sampling_max_gen_batches, or choose problems that the policy "
        "sometimes solves and sometimes fails"
    )


def _has_advantage(rows: Sequence[TrainingRow]) -> bool:
    """Whether any group among the rows has rewards that differ."""
    return any(nonzero_groups([r.reward for r in rows], [r.group for r in rows]).values())


def shape_rows(rows: Sequence[TrainingRow], grpo: GRPO) -> list[TrainingRow]:
    """Rows with the rewards that the objective sees: scaled (`grpo.reward_scaling`), then shaped
    (`grpo.reward_shaping`); unchanged where both are off.

    `stop_properly_penalty_coef` multiplies the reward of truncated completions and replaces the
    overlong penalty, as in NeMo-RL (nemo_rl/algorithms/reward_functions.py).
    """
    scaling, shaping = grpo.reward_scaling, grpo.reward_shaping
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

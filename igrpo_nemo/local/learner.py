"""The policy update: training rows in, one or more optimizer steps out.

    rows -> advantages (Eq. 4) -> minibatches (one optimizer step each)
         -> micro-batches -> log-probs -> clipped surrogate (Eq. 5) -> backward -> clip -> step

Losses are normalised over the whole minibatch before the first backward, so the split into
micro-batches changes memory and nothing else.

Shape legend: R rows, T completion tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch.optim import lr_scheduler
from transformers import PreTrainedModel

from igrpo_nemo.by_path import function_at
from igrpo_nemo.config import Config
from igrpo_nemo.errors import NonFiniteError
from igrpo_nemo.local.optimizer import restore_training
from igrpo_nemo.local.packing import LogprobBatch, completion_logprobs, split_micro_batches
from igrpo_nemo.objectives.advantage import group_advantages
from igrpo_nemo.objectives.surrogate import (
    Normalizer,
    Objective,
    SurrogateConfig,
    SurrogateInputs,
    clipped_surrogate,
    finish_metrics,
)
from igrpo_nemo.types import TrainingRow


def surrogate_config(config: Config) -> SurrogateConfig:
    """`loss_fn`, and what NeMo-RL lacks: Dr. GRPO's divisor and the shaped term's gamma."""
    values = {**config.loss_fn.model_dump(), **config.igrpo.model_dump()}
    # A key that nobody set is left out of a dump: then the default stands.
    names = [field.name for field in fields(SurrogateConfig) if field.name in values]
    return SurrogateConfig(**{name: values[name] for name in names})


class Learner:
    """Owns the policy's optimizer and schedule; `update` is the policy update of Algorithm 1.

    Of the config it reads `grpo`, `loss_fn`, `policy` and the updates of a rollout:
    `policy.sequence_packing.train_mb_tokens` bounds a packed micro-batch in tokens,
    `policy.train_micro_batch_size` a padded one in rows.

    `between_micro_batches` is called while nothing has been learned from the rollout yet; what it
    raises abandons the update and leaves weights, optimizer and schedule as they were.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        scheduler: lr_scheduler.LRScheduler,
        config: Config,
        *,
        reference: PreTrainedModel | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        between_micro_batches: Callable[[], None] = lambda: None,
    ) -> None:
        self.surrogate = surrogate_config(config)
        if self.surrogate.reference_policy_kl_penalty and reference is None:
            raise ValueError("a KL penalty needs the reference policy")
        path = config.igrpo.objective
        self.objective: Objective | None = function_at(path) if path else None
        self.model, self.reference, self.config = model, reference, config
        self.optimizer, self.scheduler = optimizer, scheduler
        self.updates = config.igrpo.updates_per_rollout
        self.autocast, self.between_micro_batches = autocast, between_micro_batches

    def update(self, rows: Sequence[TrainingRow]) -> dict[str, float]:
        """One rollout's worth of optimizer steps; returns the step's metrics.

        With one update the old log-probs are the detached new ones, which saves a forward pass.
        Overlong filtering takes truncated rows out of the loss but not out of their group's
        baseline, as in NeMo-RL. Without rows nothing is learned; the schedule advances by `updates`
        all the same. Raises `NonFiniteError` where a log-prob, the loss or the gradient is not
        finite, before the optimizer step that it would shape.
        """
        grpo = self.config.grpo
        advantages = torch.zeros(0)
        if rows:
            advantages = group_advantages(
                torch.tensor([row.reward for row in rows], dtype=torch.float32),
                [row.group for row in rows],
                normalize_rewards=grpo.normalize_rewards,
                use_leave_one_out_baseline=grpo.use_leave_one_out_baseline,
                delta=self.config.igrpo.advantage_delta,
            )
        if grpo.overlong_filtering:
            keep = [i for i, row in enumerate(rows) if not row.completion.truncated]
            rows, advantages = [rows[i] for i in keep], advantages[keep]
        per_update: list[dict[str, float]] = []
        if rows:
            advantages_R = advantages.to(self.model.device)
            old = self._logprobs(self.model, rows) if self.updates > 1 else None
            reference = self._logprobs(self.reference, rows) if self.reference is not None else None
            for indices in self._minibatches(len(rows)):
                # Once an optimizer step is taken, the rollout's updates are finished.
                may_stop = not per_update
                per_update.append(self._step(rows, indices, advantages_R, old, reference, may_stop))
        else:
            lr = float(self.scheduler.get_last_lr()[0])
        for _ in range(self.updates - len(per_update)):
            self.scheduler.step()
        if not per_update:
            return {"lr": lr, "loss": 0.0, "grad_norm": 0.0}
        return {name: sum(m[name] for m in per_update) / len(per_update) for name in per_update[0]}

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, with_schedule: bool = True) -> None:
        """Restores optimizer and schedule; without the latter, steps this one to the same place."""
        restore_training(self.optimizer, self.scheduler, state, with_schedule=with_schedule)

    def _minibatches(self, num_rows: int) -> list[list[int]]:
        """Contiguous slices of the rows, as NeMo-RL cuts its global batches: one per update, of
        sizes that differ by at most 1. There may be fewer rows than whole groups make, where
        problems were skipped or truncated rows filtered; without a row there is no update."""
        updates = min(self.updates, num_rows)
        ends = [num_rows * update // updates for update in range(updates + 1)]
        return [list(range(*ends[update : update + 2])) for update in range(updates)]

    def _micro_batches(self, rows: Sequence[TrainingRow]) -> list[list[int]]:
        policy = self.config.policy
        if policy.sequence_packing.enabled:
            limit = policy.sequence_packing.train_mb_tokens
            return split_micro_batches(rows, max_tokens=limit, max_rows=None)
        return split_micro_batches(rows, max_tokens=None, max_rows=policy.train_micro_batch_size)

    def _forward(
        self, model: PreTrainedModel, rows: Sequence[TrainingRow], *, with_entropy: bool = False
    ) -> LogprobBatch:
        policy = self.config.policy
        with self.autocast():
            return completion_logprobs(
                model,
                rows,
                temperature=policy.generation.temperature,
                packed=policy.sequence_packing.enabled,
                with_entropy=with_entropy,
            )

    def _step(
        self,
        rows: Sequence[TrainingRow],
        indices: list[int],
        advantages_R: torch.Tensor,
        old: list[torch.Tensor] | None,
        reference: list[torch.Tensor] | None,
        may_stop: bool,
    ) -> dict[str, float]:
        """One optimizer step on the rows at `indices`."""
        minibatch = [rows[i] for i in indices]
        lengths = [len(row.completion.token_ids) for row in minibatch]
        normalizer = Normalizer.from_lengths(lengths, _weights(minibatch))
        with_entropy = self.config.igrpo.entropy.exact
        self.optimizer.zero_grad(set_to_none=True)
        parts, sampled, exact = [], 0.0, 0.0
        for local in self._micro_batches(minibatch):
            if may_stop:
                self.between_micro_batches()
            picked = [indices[i] for i in local]
            chosen = [rows[i] for i in picked]
            batch = self._forward(self.model, chosen, with_entropy=with_entropy)
            weights, shaped = _weights(chosen), [row.shaped for row in chosen]
            weights_R = None if weights is None else batch.logprobs_RT.new_tensor(weights)
            frozen_RT = batch.logprobs_RT.detach()
            inputs = SurrogateInputs(
                logprobs_RT=batch.logprobs_RT,
                old_logprobs_RT=frozen_RT if old is None else _padded(old, picked, frozen_RT),
                reference_logprobs_RT=(
                    None if reference is None else _padded(reference, picked, frozen_RT)
                ),
                advantages_R=advantages_R[picked],
                lengths_R=batch.lengths_R,
                weights_R=weights_R,
                shaped_R=torch.tensor(shaped) if any(shaped) else None,
            )
            loss, metrics = clipped_surrogate(inputs, self.surrogate, normalizer, self.objective)
            loss.backward()
            parts.append(metrics)
            sampled -= _weighted_sum(frozen_RT, weights_R)
            if batch.entropy_RT is not None:
                exact += _weighted_sum(batch.entropy_RT, weights_R)
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.config.policy.max_grad_norm or float("inf")
        )
        result = {
            **finish_metrics(parts),
            "grad_norm": float(grad_norm),
            "entropy/sampled": sampled / normalizer.num_tokens,
        }
        named = {"entropy/sampled": "mean log-prob", "loss": "loss", "grad_norm": "gradient's norm"}
        for key, name in named.items():
            if not math.isfinite(result[key]):
                raise NonFiniteError(f"the {name} is {result[key]}")
        result["lr"] = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if with_entropy:
            result["entropy/exact"] = exact / normalizer.num_tokens
        return result

    @torch.no_grad()
    def _logprobs(self, model: PreTrainedModel, rows: Sequence[TrainingRow]) -> list[torch.Tensor]:
        """Log-probs of every row under a frozen policy, unpadded."""
        result: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        for indices in self._micro_batches(rows):
            batch = self._forward(model, [rows[i] for i in indices])
            for i, logprobs_T in zip(indices, batch.each_row(), strict=True):
                result[i] = logprobs_T.clone()
        return result


def _weights(rows: Sequence[TrainingRow]) -> list[float] | None:
    """The rows' shares of the loss; None where all are 1."""
    weights = [row.weight for row in rows]
    return None if all(weight == 1 for weight in weights) else weights


def _weighted_sum(values_RT: torch.Tensor, weights_R: torch.Tensor | None) -> float:
    if weights_R is not None:
        values_RT = values_RT * weights_R[:, None]
    return float(values_RT.sum())


def _padded(logprobs: list[torch.Tensor], picked: list[int], like_RT: torch.Tensor) -> torch.Tensor:
    """The frozen log-probs of the picked rows in the shape of `like_RT`, zeros behind."""
    padded_RT = torch.zeros_like(like_RT)
    for row, i in enumerate(picked):
        padded_RT[row, : len(logprobs[i])] = logprobs[i]
    return padded_RT

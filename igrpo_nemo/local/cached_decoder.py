"""Token-by-token decoding of any causal language model, through its own forward and cache.

    prefill: each prompt once -> the model's cache, one entry a prompt -> repeated for its rows
    step:    rows -> forward -> logits; finished rows leave the cache

Prompts are padded on the left and masked. Models with a recurrent state (Mamba hybrids) would
carry padding in it, so `Sampler` gives them batches of prompts of one length.

Shape legend: P prompts, R live rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from igrpo_nemo.errors import UserError
from igrpo_nemo.local.sampling import SamplingParams, StepwiseBatch

_TOLERANCE = 0.05
"""Nats that lower precision and other kernels may explain; a wrong state is further off."""


@torch.no_grad()
def check_cache(model: PreTrainedModel) -> None:
    """Raises `UserError` for a family whose cache cannot be repeated for rows and cut to some of
    them: most recurrent models without attention keep their state in another way."""
    was_training = model.training
    model.eval()
    try:  # boundary: other people's models
        batch = CachedBatch(model, [(0, 1, 2)], [3], [], SamplingParams(1, temperature=0))
        batch._next(torch.tensor([1, 2, 0], device=model.device))
        batch._keep([1, 2])
        logits_V = batch._next(torch.tensor([1, 0], device=model.device))[0]
        whole = torch.tensor([[0, 1, 2, 2, 1]], device=model.device)
        expected_V = model(input_ids=whole, use_cache=False).logits[0, -1].float()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(_refusal(model, reason)) from error
    finally:
        model.train(was_training)
    difference = (logits_V.log_softmax(-1) - expected_V.log_softmax(-1)).abs().max().item()
    # Not finite: damaged weights, which sampling names.
    if math.isfinite(difference) and difference > _TOLERANCE:
        raise UserError(_refusal(model, f"its log-probs would be {difference:.1e} nats off"))


def _refusal(model: PreTrainedModel, reason: str) -> str:
    return (
        f"model_type {model.config.model_type} cannot be sampled by the embedded engine, which "
        f"shares a prompt's cache between rows ({reason}): use a model with attention, such as "
        "qwen2 or nemotron_h, or engine=nemo_rl"
    )


class CachedBatch(StepwiseBatch):
    """One batch of rows being decoded through the model's own cache."""

    def _begin(self, prompts: Sequence[tuple[int, ...]], rows_per_prompt: Sequence[int]) -> Tensor:
        device = self._device
        lengths_P = torch.tensor([len(prompt) for prompt in prompts])
        width = int(lengths_P.max())
        input_PT = torch.zeros(len(prompts), width, dtype=torch.long)
        for row_T, prompt in zip(input_PT, prompts, strict=True):
            row_T[width - len(prompt) :] = torch.tensor(prompt)
        mask_PT = (torch.arange(width) >= width - lengths_P[:, None]).long()
        output = self._model(
            input_ids=input_PT.to(device),
            attention_mask=mask_PT.to(device),
            position_ids=(mask_PT.cumsum(1) - 1).clamp(min=0).to(device),
            use_cache=True,
            logits_to_keep=1,
        )
        rows = torch.repeat_interleave(torch.tensor(rows_per_prompt)).to(device)
        self._cache = output.past_key_values
        self._cache.reorder_cache(rows)
        self._mask_RT = mask_PT.to(device)[rows]
        self._positions_R1 = lengths_P.to(device)[rows, None]
        return output.logits[:, -1].float()[rows]

    def _keep(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, device=self._device)
        self._cache.reorder_cache(index)
        self._mask_RT, self._positions_R1 = self._mask_RT[index], self._positions_R1[index]

    @torch.no_grad()
    def _next(self, tokens_R: Tensor) -> Tensor:
        self._mask_RT = torch.cat([self._mask_RT, self._mask_RT.new_ones(len(tokens_R), 1)], 1)
        output = self._model(
            input_ids=tokens_R[:, None],
            attention_mask=self._mask_RT,
            position_ids=self._positions_R1,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache, self._positions_R1 = output.past_key_values, self._positions_R1 + 1
        return output.logits[:, -1].float()

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


@torch.no_grad()
def check_cache(model: PreTrainedModel) -> None:
    """Raises `UserError` for a family whose cache cannot be repeated for rows and cut to some of
    them: most recurrent models without attention keep their state in another way."""
    was_training = model.training
    model.eval()
    try:  # boundary: other people's models
        batch = CachedBatch(model, [(0, 1, 2)], [3])
        batch.step(torch.tensor([1, 2, 0], device=model.device))
        batch.keep([1, 2])
        logits_V = batch.step(torch.tensor([1, 0], device=model.device))[0]
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


_TOLERANCE = 0.05
"""Nats that lower precision and other kernels may explain; a wrong state is further off."""


class CachedBatch:
    """One batch of rows being decoded. Rows are numbered in order, prompt by prompt."""

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[tuple[int, ...]],
        rows_per_prompt: Sequence[int],
    ) -> None:
        self._model = model
        lengths_P = torch.tensor([len(prompt) for prompt in prompts])
        width = int(lengths_P.max())
        input_PT = torch.zeros(len(prompts), width, dtype=torch.long)
        for row_T, prompt in zip(input_PT, prompts, strict=True):
            row_T[width - len(prompt) :] = torch.tensor(prompt)
        mask_PT = (torch.arange(width) >= width - lengths_P[:, None]).long()
        positions_PT = (mask_PT.cumsum(1) - 1).clamp(min=0)
        device = model.device
        output = model(
            input_ids=input_PT.to(device),
            attention_mask=mask_PT.to(device),
            position_ids=positions_PT.to(device),
            use_cache=True,
            logits_to_keep=1,
        )
        rows = torch.repeat_interleave(torch.tensor(rows_per_prompt)).to(device)
        self._cache = output.past_key_values
        self._cache.reorder_cache(rows)
        self._mask_RT = mask_PT.to(device)[rows]
        self._lengths_R = lengths_P.to(device)[rows]
        self._step = 0
        self.first_logits = output.logits[:, -1].float()[rows]

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these of the live rows, renumbered in this order."""
        index = torch.tensor(rows, device=self._mask_RT.device)
        self._cache.reorder_cache(index)
        self._mask_RT, self._lengths_R = self._mask_RT[index], self._lengths_R[index]

    @torch.no_grad()
    def step(self, tokens_R: Tensor) -> Tensor:
        """Appends a token to every live row; the logits of the next one: [R, V]."""
        self._mask_RT = torch.cat([self._mask_RT, self._mask_RT.new_ones(len(tokens_R), 1)], 1)
        output = self._model(
            input_ids=tokens_R[:, None],
            attention_mask=self._mask_RT,
            position_ids=(self._lengths_R + self._step)[:, None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        self._step += 1
        return output.logits[:, -1].float()

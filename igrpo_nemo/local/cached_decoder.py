"""Token-by-token decoding of any causal language model, through its own forward and cache.

    prefill: each prompt once -> the model's cache, one entry a prompt -> repeated for its rows
    step:    rows -> forward -> logits; finished rows leave the cache

Prompts are padded on the left and masked. Models with a recurrent state (Mamba hybrids) would
carry padding in it, so `Sampler` gives them batches of prompts of one length.

Shape legend: P prompts, R live rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel


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

"""Token-by-token decoding of Llama-like models, prompts shared by their rows.

    prefill: each prompt once, but for its last token -> its keys and values, kept per prompt
    step:    rows -> fused layers; a row attends to its prompt's keys (one product for all rows of
             the prompt) and to its own, which lie in [P * W] slots; one softmax over both

Finished rows leave the matrix products at once, and the slots when enough of them are empty.

Shape legend: P prompts, W slots a prompt, R live rows, H query heads, K key-value heads, g = H / K,
D head size, T prompt tokens (padded), S own tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from igrpo_nemo.local.fused.decoder import (
    DecoderWeights,
    LayerWeights,
    decoder_weights,
    keys_and_values,
    rotary_tables,
)
from igrpo_nemo.local.fused.group_layout import group_layout
from igrpo_nemo.local.fused.kernels import matmul_nt, rotate_, split_heads, unit_rms
from igrpo_nemo.local.sampling import StepwiseBatch

# Row counts are rounded up to a multiple of this: few shapes, which matrix libraries cache.
_ROW_MULTIPLE = 8
_FIRST_CAPACITY = 64


@torch.no_grad()
def _folded(weights: DecoderWeights) -> DecoderWeights:
    """Norms folded into the matrices behind them, the attention scale into the queries."""
    q_size = weights.heads[0] * weights.head_size

    def fold(layer: LayerWeights) -> LayerWeights:
        qkv, bias = layer.qkv * layer.attention_norm, layer.qkv_bias
        qkv[:q_size] *= weights.scale
        if bias is not None:
            bias = bias.clone()
            bias[:q_size] *= weights.scale
        return LayerWeights(
            attention_norm=torch.ones_like(layer.attention_norm),
            qkv=qkv,
            qkv_bias=bias,
            output=layer.output,
            mlp_norm=torch.ones_like(layer.mlp_norm),
            gate_up=layer.gate_up * layer.mlp_norm,
            down=layer.down,
        )

    return replace(
        weights,
        layers=tuple(fold(layer) for layer in weights.layers),
        norm=torch.ones_like(weights.norm),
        head=weights.head * weights.norm,
        scale=1.0,
    )


@dataclass(slots=True)
class _LayerCache:
    """Keys and values of one layer: of the prompts, and of the rows' own tokens."""

    prompt_keys: Tensor
    """[P * K, D, T]"""
    prompt_values: Tensor
    """[P * K, T, D]"""
    own: Tensor
    """[2, P * W * K, capacity, D]: keys, values."""


class FusedBatch(StepwiseBatch):
    """One batch of rows being decoded, with the model's weights as they are now, on the CPU."""

    def _begin(self, prompts: Sequence[tuple[int, ...]], rows_per_prompt: Sequence[int]) -> Tensor:
        self._weights = _folded(decoder_weights(self._model))
        self._prompts, self._width = len(prompts), max(rows_per_prompt)
        self._slots = [
            p * self._width + w for p, count in enumerate(rows_per_prompt) for w in range(count)
        ]
        self._starts = torch.tensor([len(prompt) - 1 for prompt in prompts])
        self._step = 0
        self._layers: list[_LayerCache] = []
        self._mask: Tensor | None = None
        self._prefill(prompts)
        self._index_rows()
        last_tokens = [prompts[slot // self._width][-1] for slot in self._slots]
        return self._next(torch.tensor(last_tokens))

    def _prefill(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Caches each prompt's keys and values but for its last token, which is stepped."""
        weights, starts = self._weights, self._starts
        P, T, K = len(prompts), int(starts.max()), weights.heads[1]
        inside_PT = torch.arange(T) < starts[:, None]
        places = inside_PT.flatten().nonzero().squeeze(1)
        input_L = torch.tensor([t for prompt in prompts for t in prompt[:-1]], dtype=torch.long)
        rotary = rotary_tables(self._model, torch.arange(T).expand(P, T)[inside_PT], weights.norm)
        layout = group_layout(starts.tolist(), [[]] * P, self._device)
        for keys_values in keys_and_values(weights, input_L, rotary, layout):
            keys, values = (
                x.new_zeros(P * T, *x.shape[1:]).index_copy_(0, places, x).view(P, T, *x.shape[1:])
                for x in keys_values
            )
            self._layers.append(
                _LayerCache(
                    keys.permute(0, 2, 3, 1).flatten(0, 1).contiguous(),
                    values.transpose(1, 2).flatten(0, 1).contiguous(),
                    keys.new_empty(2, P * self._width * K, _FIRST_CAPACITY, keys.shape[-1]),
                )
            )
        if int(starts.min()) < T:
            mask_PT = torch.zeros(P, T).masked_fill(~inside_PT, -torch.inf)
            self._mask = mask_PT.repeat_interleave(K, dim=0)[:, None, :]

    def _index_rows(self) -> None:
        """Maps between live rows (padded to a round number) and slots."""
        rows, num_slots = self._slots, self._prompts * self._width
        padded = min(-(-len(rows) // _ROW_MULTIPLE) * _ROW_MULTIPLE, num_slots)
        self._dense = rows == list(range(num_slots))
        self._slot_of_row = torch.tensor(rows + [rows[-1]] * (padded - len(rows)))
        self._row_of_slot = torch.zeros(num_slots, dtype=torch.long)
        self._row_of_slot[rows] = torch.arange(len(rows))
        self._first_position = self._starts[self._slot_of_row // self._width]

    def _keep(self, rows: Sequence[int]) -> None:
        self._slots = [self._slots[row] for row in rows]
        self._compact()
        self._index_rows()

    def _compact(self) -> None:
        """Gives up empty slots once a quarter of the work on them would be saved."""
        by_prompt: dict[int, list[int]] = {}
        for slot in self._slots:
            by_prompt.setdefault(slot // self._width, []).append(slot)
        width = max(len(slots) for slots in by_prompt.values())
        if len(by_prompt) * width > 0.75 * self._prompts * self._width:
            return
        K = self._weights.heads[1]
        padded = [(slots + [slots[-1]] * width)[:width] for slots in by_prompt.values()]
        prompt_heads, slot_heads = (
            (torch.tensor(numbers).reshape(-1, 1) * K + torch.arange(K)).flatten()
            for numbers in (list(by_prompt), padded)
        )
        for layer in self._layers:
            layer.prompt_keys = layer.prompt_keys[prompt_heads]
            layer.prompt_values = layer.prompt_values[prompt_heads]
            layer.own = layer.own[:, slot_heads]
        if self._mask is not None:
            self._mask = self._mask[prompt_heads]
        self._starts = self._starts[list(by_prompt)]
        self._slots = [
            p * width + w for p, kept in enumerate(by_prompt.values()) for w in range(len(kept))
        ]
        self._prompts, self._width = len(by_prompt), width

    @torch.no_grad()
    def _next(self, tokens_R: Tensor) -> Tensor:
        if self._step >= self._layers[0].own.shape[2]:
            for layer in self._layers:
                layer.own = F.pad(layer.own, (0, 0, 0, layer.own.shape[2]))
        weights, num_rows = self._weights, len(self._slots)
        padding = len(self._slot_of_row) - num_rows
        if padding:
            tokens_R = torch.cat([tokens_R, tokens_R[-1:].expand(padding)])
        hidden_RI = F.embedding(tokens_R, weights.embedding)
        cos, sin = rotary_tables(self._model, self._first_position + self._step, weights.norm)
        for layer, cache in zip(weights.layers, self._layers, strict=True):
            unit_RI, _ = unit_rms(hidden_RI, weights.eps)
            qkv_RX = matmul_nt(unit_RI, layer.qkv, layer.qkv_bias)
            rotate_(split_heads(qkv_RX, weights.heads)[3], cos, sin)
            hidden_RI += matmul_nt(self._attend(qkv_RX, cache), layer.output)
            unit_RI, _ = unit_rms(hidden_RI, weights.eps)
            gate_RX, up_RX = matmul_nt(unit_RI, layer.gate_up).chunk(2, dim=-1)
            hidden_RI += matmul_nt(F.silu(gate_RX).mul_(up_RX), layer.down)
        self._step += 1
        unit_RI, _ = unit_rms(hidden_RI[:num_rows], weights.eps)
        return matmul_nt(unit_RI, weights.head)

    def _attend(self, qkv_RX: Tensor, cache: _LayerCache) -> Tensor:
        """Attention of each row's newest token: [R, H * D]."""
        P, W, S = self._prompts, self._width, self._step + 1
        (H, K), D = self._weights.heads, self._weights.head_size
        g = H // K
        slots_NX = qkv_RX if self._dense else qkv_RX[self._row_of_slot]
        own_2NKSD = cache.own.unflatten(1, (P * W, K))
        keys_values = slots_NX[:, H * D :].unflatten(1, (2, K, D))
        own_2NKSD[:, :, :, self._step] = keys_values.transpose(0, 1)
        queries = slots_NX[:, : H * D].unflatten(0, (P, W)).unflatten(2, (K, g, D))
        by_prompt = queries.transpose(1, 2).reshape(P * K, W * g, D)
        by_slot = queries.reshape(P * W * K, g, D)
        own_keys, own_values = cache.own[:, :, :S]
        if self._mask is None:
            prompt_scores = torch.bmm(by_prompt, cache.prompt_keys)
        else:
            prompt_scores = torch.baddbmm(self._mask, by_prompt, cache.prompt_keys)
        own_scores = torch.bmm(by_slot, own_keys.transpose(1, 2))
        own_scores = own_scores.view(P, W, K, g, S).transpose(1, 2).reshape(P * K, W * g, S)
        T = prompt_scores.shape[2]
        probs = torch.softmax(torch.cat([prompt_scores, own_scores], dim=2), dim=2)
        attended = torch.bmm(probs[:, :, :T], cache.prompt_values)
        own_probs = probs[:, :, T:].reshape(P, K, W, g, S).transpose(1, 2)
        own = torch.bmm(own_probs.reshape(P * W * K, g, S), own_values)
        out = own.view(P, W, K, g, D).add_(attended.view(P, K, W, g, D).transpose(1, 2))
        out_NX = out.view(P * W, H * D)
        return out_NX if self._dense else out_NX[self._slot_of_row]

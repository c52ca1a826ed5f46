"""Attention of a decoding step over buffers that stay in place, and those buffers.

    prefill  a flat stream of prompts attends to itself; its keys and values go to every row's slot
    step     a row's newest token: its key and value into the slot, then attention over the slot

Shape legend: R rows (slots of the buffers), S tokens of a slot, w of them that are read, B steps
of a block, T prompt tokens, L flat prompt tokens, K key-value heads, H query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from igrpo_nemo.local.fused.group_attention import group_attention
from igrpo_nemo.local.fused.group_layout import GroupLayout, Sequences
from igrpo_nemo.local.fused.stream_attention import stream
from igrpo_nemo.local.sampling import UniformTable

IMPLEMENTATION = "igrpo_static"


def heads_of(model: PreTrainedModel) -> tuple[int, int]:
    """Key-value heads of a layer, and their size."""
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, size


@dataclass(slots=True)
class RowBuffers:
    """Keys and values of every row, and what a step reads and writes; the graphs that do it."""

    model: PreTrainedModel
    keys: list[Tensor]
    """per layer [R, S, K, D]"""
    values: list[Tensor]
    tokens_R: Tensor
    positions_R: Tensor
    column: Tensor
    """[1]: the step's place in the blocks below."""
    uniforms_RB: Tensor
    drawn_RB: Tensor
    logprobs_RB: Tensor
    graphs: dict[Any, Callable[[], None]] = field(default_factory=dict)
    pool: Any = None
    """What captured steps work in: all in the same memory, as they never run at once."""

    @classmethod
    def of(cls, model: PreTrainedModel, rows: int, width: int) -> RowBuffers:
        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=model.device)

        # Zeros: a slot's end is masked, and what is masked must be a number.
        slots, layers = (rows, width, *heads_of(model)), range(model.config.num_hidden_layers)
        keys, values = ([zeros(*slots, dtype=model.dtype) for _ in layers] for _ in range(2))
        block = (rows, UniformTable.BLOCK)
        return cls(
            model,
            keys,
            values,
            tokens_R=zeros(rows),
            positions_R=zeros(rows),
            column=zeros(1),
            uniforms_RB=zeros(*block, dtype=torch.float64),
            drawn_RB=zeros(*block),
            logprobs_RB=zeros(*block, dtype=torch.float32),
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.keys[0].shape[0], self.keys[0].shape[1]

    @property
    def reads_lengths(self) -> bool:
        """Whether there is a kernel that reads of each row what there is: FlashAttention 2."""
        keys = self.keys[0]
        half = keys.dtype in (torch.bfloat16, torch.float16)
        return keys.is_cuda and half and keys.shape[3] % 8 == 0 and keys.shape[3] <= 256

    @property
    def num_bytes(self) -> int:
        return 2 * len(self.keys) * self.keys[0].nbytes


@dataclass(slots=True)
class PrefillState:
    """The flat stream of the prompts, and where its tokens go: `source_RT` indexes into it."""

    buffers: RowBuffers
    layout: GroupLayout
    source_RT: Tensor


@dataclass(slots=True)
class StepState:
    """What attention needs of a step, beside the buffers: which rows, and what of them is read."""

    buffers: RowBuffers
    rows_R: Tensor
    width: int
    bias_R11w: Tensor | None = None
    """0 where a row's token is, -inf behind."""
    sequences: Sequences | None = None
    """For the kernel that takes each row's own length."""
    lengths_R: Tensor | None = None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    static: StepState | PrefillState,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that a Hugging Face model calls: [B, H, T, D] -> [B, T, H, D]."""
    layer: Any = module.layer_idx
    keys, values = static.buffers.keys[layer], static.buffers.values[layer]
    if isinstance(static, PrefillState):
        q_LHD, k_LKD, v_LKD = (x[0].transpose(0, 1) for x in (query, key, value))
        R, T = static.source_RT.shape
        keys[:R, :T] = k_LKD[static.source_RT]
        values[:R, :T] = v_LKD[static.source_RT]
        return group_attention(q_LHD, k_LKD, v_LKD, static.layout, scaling)[None], None
    R, H = query.shape[:2]
    positions_R = static.buffers.positions_R[:R]
    keys[static.rows_R, positions_R] = key[:, :, 0]
    values[static.rows_R, positions_R] = value[:, :, 0]
    if static.sequences is not None:
        flat = (keys.flatten(0, 1), values.flatten(0, 1))
        out, *_ = stream(
            query[:, :, 0], *flat, static.sequences, False, scaling, key_lengths=static.lengths_R
        )
        return out[:, None], None
    assert static.bias_R11w is not None
    # The query heads of a key-value head take the place of queries: nothing is repeated for them.
    grouped = query.reshape(R, keys.shape[2], -1, query.shape[3])
    out = F.scaled_dot_product_attention(
        grouped,
        keys[:R, : static.width].transpose(1, 2),
        values[:R, : static.width].transpose(1, 2),
        static.bias_R11w.expand(-1, keys.shape[2], grouped.shape[2], -1),
        scale=scaling,
    )
    return out.reshape(R, 1, H, -1), None


AttentionInterface.register(IMPLEMENTATION, _attention)

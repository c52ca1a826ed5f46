"""A Llama-like decoder as a function of fused weights: the fast path of training and prefill.

    model -> decoder_weights -> DecoderWeights --decode(tokens, positions, layout)--> hidden states

The same numbers as the model's own forward (to rounding), with queries, keys and values in one
matrix product, gate and up in another, and nothing computed in the last layer but what the
predicting tokens need. Families that differ from this picture keep their own forward.

Shape legend: L flat tokens, I hidden size, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from igrpo_nemo.local.group_attention import GroupLayout
from igrpo_nemo.local.kernels import (
    linear,
    rms_norm_linear,
    rotary_attention,
    split_heads,
    swiglu_linear,
)

_FAMILIES = frozenset({"llama", "mistral", "qwen2"})
# Rotary scalings whose frequencies do not depend on the length of the sequence at hand.
_STATIC_ROPES = frozenset({"default", "linear", "llama3", "yarn"})


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer; `qkv` stacks queries, keys and values, `gate_up` gate and up."""

    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All of a decoder: `heads` is (H, K), `scale` that of the attention scores."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor
    heads: tuple[int, int]
    head_size: int
    eps: float
    scale: float


def can_fuse(model: PreTrainedModel) -> bool:
    """Whether the model is a plain Llama-like decoder, so that `decode` computes what it does."""
    config = model.config
    if config.model_type not in _FAMILIES or getattr(config, "mlp_bias", False):
        return False
    rope = getattr(config, "rope_parameters", None) or {}
    plain = all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
    windowed = getattr(config, "sliding_window", None) and getattr(
        config, "use_sliding_window", True
    )
    return (
        plain
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in _STATIC_ROPES
        and not windowed
        and model.get_output_embeddings().bias is None
        and all(layer.self_attn.o_proj.bias is None for layer in model.base_model.layers)
    )


def decoder_weights(model: PreTrainedModel) -> DecoderWeights:
    """The model's parameters in fused form; the gradient flows back to them."""
    config, base = model.config, model.base_model
    H = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // H
    return DecoderWeights(
        embedding=base.embed_tokens.weight,
        layers=tuple(_layer_weights(layer) for layer in base.layers),
        norm=base.norm.weight,
        head=model.get_output_embeddings().weight,
        heads=(H, config.num_key_value_heads),
        head_size=head_size,
        eps=config.rms_norm_eps,
        scale=head_size**-0.5,
    )


def _layer_weights(layer: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    biases = [projection.bias for projection in projections]
    return LayerWeights(
        attention_norm=layer.input_layernorm.weight,
        qkv=torch.cat([projection.weight for projection in projections]),
        qkv_bias=None if biases[0] is None else torch.cat(biases),
        output=attention.o_proj.weight,
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
        down=mlp.down_proj.weight,
    )


def rotary_tables(model: PreTrainedModel, positions_L: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of each position, as the model makes them: [L, 1, D / 2] each."""
    cos, sin = model.base_model.rotary_emb(like, positions_L[None])
    half = cos.shape[-1] // 2
    return cos[0, :, None, :half].contiguous(), sin[0, :, None, :half].contiguous()


def decode(
    weights: DecoderWeights,
    input_L: Tensor,
    rotary: tuple[Tensor, Tensor],
    layout: GroupLayout,
    *,
    on_keys_values: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Hidden states, before the final norm, of the tokens from `layout.tail` on: [L - tail, I].

    `on_keys_values(layer, k [L, K, D], v [L, K, D])` sees each layer's rotated keys and values.
    """
    hidden_LI = F.embedding(input_L, weights.embedding)
    cos, sin = rotary
    last = len(weights.layers) - 1
    for number, layer in enumerate(weights.layers):
        qkv_LX = rms_norm_linear(
            hidden_LI, layer.attention_norm, layer.qkv, layer.qkv_bias, weights.eps
        )
        part = layout.tail_layout() if number == last else layout
        attended_LX = rotary_attention(qkv_LX, cos, sin, part, weights.heads, weights.scale)
        if on_keys_values is not None:
            _, keys, values, _ = split_heads(qkv_LX, weights.heads)
            on_keys_values(number, keys, values)
        if number == last:
            hidden_LI, attended_LX = hidden_LI[layout.tail :], attended_LX[layout.tail :]
        hidden_LI = hidden_LI + linear(attended_LX, layer.output)
        gate_up_LX = rms_norm_linear(hidden_LI, layer.mlp_norm, layer.gate_up, None, weights.eps)
        hidden_LI = hidden_LI + swiglu_linear(gate_up_LX, layer.down)
    return hidden_LI


def decoder_logits(weights: DecoderWeights, hidden_AI: Tensor) -> Tensor:
    """Final norm and head: [A, V]."""
    return rms_norm_linear(hidden_AI, weights.norm, weights.head, None, weights.eps)

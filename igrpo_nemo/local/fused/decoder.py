"""A Llama-like decoder as a function of fused weights: the fast path of training and prefill.

    model -> decoder_weights -> DecoderWeights --decode(tokens, positions, layout)--> hidden states
                                               --keys_and_values--> a prompt's cache

The same numbers as the model's own forward (to rounding), with queries, keys and values in one
matrix product, gate and up in another, and nothing computed in the last layer but what the
predicting tokens need. Families that differ from this picture keep their own forward.

Shape legend: L flat tokens, I hidden size, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from igrpo_nemo.local.fused.group_attention import group_attention
from igrpo_nemo.local.fused.group_layout import GroupLayout
from igrpo_nemo.local.fused.kernels import (
    gated_mlp,
    linear,
    rms_norm_linear,
    rotary_attention,
    rotate_,
    split_heads,
)

# Families whose tokens meet in full attention alone, through the attention interface; those of
# them whose layers are the ones below.
_PACKABLE_FAMILIES = frozenset({"qwen2", "qwen3", "llama", "mistral"})
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
    """All of a decoder: `heads` is (H, K), `scale` that of the attention scores.

    The embedding of `padding_idx` gets no gradient, as in the model itself.
    """

    embedding: Tensor
    padding_idx: int | None
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor
    heads: tuple[int, int]
    head_size: int
    eps: float
    scale: float


def can_pack(model: PreTrainedModel) -> bool:
    """Whether the model's tokens meet only in full attention that we may replace."""
    config = model.config
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) and getattr(
        config, "use_sliding_window", True
    )
    return (
        config.model_type in _PACKABLE_FAMILIES
        and bool(model._supports_attention_backend)
        and layer_types == {"full_attention"}
        and not windowed
    )


def can_fuse(model: PreTrainedModel) -> bool:
    """Whether the model is a plain Llama-like decoder, so that `decode` computes what it does."""
    config = model.config
    if config.model_type not in _FAMILIES or not can_pack(model):
        return False
    rope = getattr(config, "rope_parameters", None) or {}
    plain = all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
    return (
        plain
        and not getattr(config, "mlp_bias", False)
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in _STATIC_ROPES
        and _part(model.get_output_embeddings()).bias is None
        and all(layer.self_attn.o_proj.bias is None for layer in _part(model.base_model).layers)
    )


def decoder_weights(model: PreTrainedModel) -> DecoderWeights:
    """The model's parameters in fused form; the gradient flows back to them."""
    config, base = model.config, _part(model.base_model)
    H = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // H
    return DecoderWeights(
        embedding=base.embed_tokens.weight,
        padding_idx=base.embed_tokens.padding_idx,
        layers=tuple(_layer_weights(layer) for layer in base.layers),
        norm=base.norm.weight,
        head=_part(model.get_output_embeddings()).weight,
        heads=(H, config.num_key_value_heads),
        head_size=head_size,
        eps=config.rms_norm_eps,
        scale=head_size**-0.5,
    )


def _part(module: Any) -> Any:
    """A module whose parts are known by its family, which type checkers cannot know."""
    return module


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


def rotary_tables(
    model: PreTrainedModel, positions_L: Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    """cos and sin of each position, as the model makes them: [L, 1, D / 2] each."""
    cos, sin = _part(model.base_model).rotary_emb(like, positions_L[None])
    half = cos.shape[-1] // 2
    return cos[0, :, None, :half].contiguous(), sin[0, :, None, :half].contiguous()


def decode(
    weights: DecoderWeights, input_L: Tensor, rotary: tuple[Tensor, Tensor], layout: GroupLayout
) -> Tensor:
    """Hidden states, before the final norm, of the tokens from `layout.tail` on: [L - tail, I]."""
    hidden_LI = F.embedding(input_L, weights.embedding, weights.padding_idx)
    for layer in weights.layers[:-1]:
        qkv_LX = _qkv(weights, layer, hidden_LI)
        attended_LX = rotary_attention(qkv_LX, *rotary, layout, weights.heads, weights.scale)
        hidden_LI = _after_attention(weights, layer, hidden_LI, attended_LX)
    layer, part, tail = weights.layers[-1], layout.tail_layout(), layout.tail
    qkv_LX = _qkv(weights, layer, hidden_LI)
    attended_LX = rotary_attention(qkv_LX, *rotary, part, weights.heads, weights.scale)
    return _after_attention(weights, layer, hidden_LI[tail:], attended_LX[tail:])


@torch.no_grad()
def keys_and_values(
    weights: DecoderWeights, input_L: Tensor, rotary: tuple[Tensor, Tensor], layout: GroupLayout
) -> Iterator[tuple[Tensor, Tensor]]:
    """The rotated keys and the values of each layer in turn: [L, K, D] each."""
    hidden_LI = F.embedding(input_L, weights.embedding)
    for layer in weights.layers:
        qkv_LX = _qkv(weights, layer, hidden_LI)
        q_LHD, k_LKD, v_LKD, rotated = split_heads(qkv_LX, weights.heads)
        rotate_(rotated, *rotary)
        yield k_LKD, v_LKD
        if layer is not weights.layers[-1]:
            attended_LHD = group_attention(q_LHD, k_LKD, v_LKD, layout, weights.scale)
            hidden_LI = _after_attention(weights, layer, hidden_LI, attended_LHD.flatten(1))


def _qkv(weights: DecoderWeights, layer: LayerWeights, hidden_LI: Tensor) -> Tensor:
    return rms_norm_linear(hidden_LI, layer.attention_norm, layer.qkv, layer.qkv_bias, weights.eps)


def _after_attention(
    weights: DecoderWeights, layer: LayerWeights, hidden_LI: Tensor, attended_LX: Tensor
) -> Tensor:
    hidden_LI = hidden_LI + linear(attended_LX, layer.output)
    return gated_mlp(hidden_LI, layer.mlp_norm, layer.gate_up, layer.down, weights.eps)


def decoder_logits(weights: DecoderWeights, hidden_AI: Tensor) -> Tensor:
    """Final norm and head: [A, V]."""
    return rms_norm_linear(hidden_AI, weights.norm, weights.head, None, weights.eps)

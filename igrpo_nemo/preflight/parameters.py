"""Counts that follow from a shape: parameters, their shares on a GPU, operations, cache bytes.

Symbols: h hidden, H query heads, K key-value heads, D head size, I feed-forward width, V
vocabulary.
A multiplication and an addition are two operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from igrpo_nemo.preflight.shape import Shape

BF16, FP32 = 2, 4
"""Bytes of a number."""

VOCAB_MULTIPLE = 128
"""Megatron pads the vocabulary to a multiple of this times the tensor parallel size."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Parameters by where they are: matrices of the layers, everything that is not sharded by
    tensor parallelism, the embedding, and the head (0 where it is the embedding)."""

    attention: int
    mlp: int
    mamba: int
    replicated: int
    embedding: int
    head: int

    @property
    def layers(self) -> int:
        """Matrices of all layers."""
        return self.attention + self.mlp + self.mamba

    @property
    def total(self) -> int:
        return self.layers + self.replicated + self.embedding + self.head


def counts(shape: Shape) -> Counts:
    """Every parameter of the model, exactly."""
    h, mamba = shape.hidden, shape.mamba
    layers = shape.attention_layers + shape.mlp_layers + shape.mamba_layers
    replicated = h * (layers + 1)  # one norm before each layer, one at the end
    if shape.qk_norm:
        replicated += 2 * shape.head_dim * shape.attention_layers
    if shape.output_bias:
        replicated += h * shape.attention_layers
    per_mamba = 0
    if mamba is not None:
        per_mamba = h * (mamba.inner + mamba.conv + mamba.heads)  # in_proj: gate, x B C, step
        per_mamba += mamba.conv * (mamba.conv_kernel + 1)  # the convolution and its bias
        per_mamba += 3 * mamba.heads + mamba.inner  # A, D, the step's bias; the gated norm
        per_mamba += mamba.inner * h  # out_proj
    return Counts(
        attention=attention_parameters(shape) * shape.attention_layers,
        mlp=mlp_parameters(shape) * shape.mlp_layers,
        mamba=per_mamba * shape.mamba_layers,
        replicated=replicated,
        embedding=shape.vocab * h,
        head=0 if shape.tied else shape.vocab * h,
    )


def attention_parameters(shape: Shape) -> int:
    """Of one attention layer: h (H + 2K) D + H D h, and the biases of q, k, v."""
    qkv = shape.q_size + 2 * shape.kv_size
    return shape.hidden * (qkv + shape.q_size) + (qkv if shape.qkv_bias else 0)


def mlp_parameters(shape: Shape) -> int:
    """Of one feed-forward layer: 3 h I with a gate, 2 h I without."""
    return (3 if shape.gated_mlp else 2) * shape.hidden * shape.intermediate


def padded_vocab(shape: Shape, tensor: int) -> int:
    """Rows of Megatron's embedding."""
    multiple = VOCAB_MULTIPLE * tensor
    return -(-shape.vocab // multiple) * multiple


def rank_parameters(shape: Shape, tensor: int, pipeline: int) -> int:
    """Parameters on the fullest Megatron rank: the first or last pipeline stage."""
    c = counts(shape)
    table = padded_vocab(shape, tensor) * shape.hidden
    tables = table if pipeline > 1 or shape.tied else 2 * table
    return math.ceil(c.layers / (tensor * pipeline) + c.replicated / pipeline + tables / tensor)


def kv_bytes_per_token(shape: Shape, tensor: int = 1, bytes_each: int = BF16) -> int:
    """Cache of one token on one GPU: 2 K D per attention layer; heads below `tensor` repeat."""
    return 2 * shape.attention_layers * _local_kv(shape, tensor) * shape.head_dim * bytes_each


def _local_kv(shape: Shape, tensor: int) -> int:
    return max(1, shape.kv_heads // tensor)


def state_bytes_per_sequence(shape: Shape, tensor: int = 1, ssm_bytes: int = FP32) -> int:
    """Mamba-2's state of one sequence on one GPU: the scan's and the convolution's."""
    mamba = shape.mamba
    if mamba is None:
        return 0
    scan = mamba.inner * mamba.state * ssm_bytes
    convolution = mamba.conv * (mamba.conv_kernel - 1) * BF16
    return shape.mamba_layers * (scan + convolution) // tensor


def matrix_flops_per_token(shape: Shape) -> int:
    """Of a forward pass: two per parameter of a matrix; the embedding is a lookup."""
    c = counts(shape)
    scan = 0
    if shape.mamba is not None:
        # State update and readout of every channel, in the chunked form about three times.
        scan = 6 * shape.mamba.inner * shape.mamba.state * shape.mamba_layers
    return 2 * (c.layers + shape.vocab * shape.hidden) + scan


def attention_flops_per_token(shape: Shape, context: float) -> float:
    """Of a forward pass at a token that sees `context` others: q k^T and p v in every layer."""
    return 4 * shape.attention_layers * shape.q_size * context


def forward_flops(shape: Shape, tokens: float, start: float = 0.0) -> float:
    """Of `tokens` consecutive tokens whose first sees `start` others, under a causal mask."""
    mean_context = start + tokens / 2
    return tokens * (matrix_flops_per_token(shape) + attention_flops_per_token(shape, mean_context))

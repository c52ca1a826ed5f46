"""A model's shape, from the config alone, and the counts that follow from it.

    policy.model_name/config.json | igrpo.architecture | igrpo.model --> Shape
    Shape --> parameters, their shares on a GPU, operations, cache bytes

A folder's own config.json wins over `igrpo.architecture`: it is what will be trained. Nothing is
downloaded and no weights are opened. Symbols: h hidden, H query heads, K key-value heads, D head
size, I feed-forward width, V vocabulary; a multiplication and an addition are two operations.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igrpo_nemo.config import Config
from igrpo_nemo.config.machines import LowRank
from igrpo_nemo.errors import UserError
from igrpo_nemo.files import model_folder

FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "nemotron_h")
"""The model types whose parameters and memory are known here."""

BF16, FP32 = 2, 4
"""Bytes of a number."""

VOCAB_MULTIPLE = 128
"""Megatron pads the vocabulary to a multiple of this times the tensor parallel size."""

HEAD = {"megatron": "output_layer", "dtensor": "lm_head"}
"""The name of the layer behind the last one."""


@dataclass(frozen=True, slots=True)
class MambaShape:
    """A Mamba-2 layer (arXiv 2405.21060): `heads` of `head_dim` channels, `state` values each;
    `chunk` tokens of its scan are computed at a time."""

    heads: int
    head_dim: int
    groups: int
    state: int
    conv_kernel: int
    chunk: int

    @property
    def inner(self) -> int:
        """Channels of the layer."""
        return self.heads * self.head_dim

    @property
    def conv(self) -> int:
        """Channels of the causal convolution: x, B and C."""
        return self.inner + 2 * self.groups * self.state

    @property
    def in_proj(self) -> int:
        """Channels behind the first matrix: gate, x B C, step."""
        return self.inner + self.conv + self.heads


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder: how many layers of each kind, and their widths.

    `depth` counts what is recomputed as one layer: a Qwen2 layer is one attention and one
    feed-forward layer here, a Nemotron-H layer is one of either. Every attention, feed-forward and
    Mamba layer has one norm before it.
    """

    family: str
    hidden: int
    depth: int
    attention_layers: int
    mlp_layers: int
    mamba_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    gated_mlp: bool
    vocab: int
    context: int
    tied: bool
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    mamba: MambaShape | None
    source: str

    @property
    def q_size(self) -> int:
        """Channels of the queries."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Channels of the keys, and of the values."""
        return self.kv_heads * self.head_dim

    @property
    def mlp_channels(self) -> int:
        """Channels that a feed-forward layer keeps between its matrices: gate, up, their product;
        as many rows of h does it have in its matrices."""
        return (3 if self.gated_mlp else 2) * self.intermediate

    @property
    def matrices(self) -> int:
        """Parameters in the layers' matrices and their biases, which tensor parallelism shards."""
        h, mamba = self.hidden, self.mamba
        qkv = self.q_size + 2 * self.kv_size  # h (H + 2K) D and H D h, and the biases of q, k, v
        attention = h * (qkv + self.q_size) + (qkv if self.qkv_bias else 0)
        count = attention * self.attention_layers + h * self.mlp_channels * self.mlp_layers
        if mamba is not None:
            each = h * mamba.in_proj + mamba.inner * h  # in_proj and out_proj
            each += mamba.conv * (mamba.conv_kernel + 1)  # the convolution and its bias
            each += 3 * mamba.heads + mamba.inner  # A, D, the step's bias; the gated norm
            count += each * self.mamba_layers
        return count

    @property
    def replicated(self) -> int:
        """Parameters that tensor parallelism does not shard: a norm before each layer and one at
        the end, norms of q and k, the output's bias."""
        layers = self.attention_layers + self.mlp_layers + self.mamba_layers
        each = 2 * self.head_dim if self.qk_norm else 0
        each += self.hidden if self.output_bias else 0
        return self.hidden * (layers + 1) + each * self.attention_layers

    @property
    def tables(self) -> int:
        """Parameters of the embedding, and of the head where it is another table."""
        return (1 if self.tied else 2) * self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Every parameter of the model, exactly."""
        return self.matrices + self.replicated + self.tables


def shape_of(config: Config, environ: Mapping[str, str] = os.environ) -> Shape | None:
    """The shape of the model to train; None where neither config nor disk describes it.

    Raises `UserError` for a config.json that cannot be read or lacks a field.
    """
    if (small := config.igrpo.model) is not None:
        fields = {
            **small.model_dump(include={"hidden_size", "intermediate_size", "vocab_size"}),
            "model_type": "qwen2",
            "num_hidden_layers": small.num_layers,
            "num_attention_heads": small.num_heads,
            "num_key_value_heads": small.num_kv_heads,
            "max_position_embeddings": config.policy.max_total_sequence_length,
            "tie_word_embeddings": True,
        }
        return _from_fields(fields, "igrpo.model")
    folder = model_folder(config.policy.model_name, environ)
    if folder is not None:
        return _from_config_json(folder / "config.json")
    if (described := config.igrpo.architecture) is None:
        return None
    return _from_fields(described.model_dump(exclude_none=True), "igrpo.architecture")


def _from_config_json(path: Path) -> Shape | None:
    """The shape that a config.json describes; None for a family that is not known here."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON file: copy the model's folder again") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} holds no JSON object: copy the model's folder again")
    if fields.get("model_type") not in FAMILIES:
        return None
    return _from_fields(fields, str(path))


def _from_fields(fields: Mapping[str, Any], source: str) -> Shape:
    """A shape from the fields of a config.json. Raises `UserError` naming a field that misses."""

    def need(name: str) -> int:
        value = fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{source}: {name} is {value!r}: give the value of the model's config")
        return value

    family, bias = str(fields["model_type"]), bool(fields.get("attention_bias"))
    hidden, heads, depth = (
        need(f) for f in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    counts, mamba = (depth, depth, 0), None
    if hybrid := family == "nemotron_h":
        pattern = fields.get("hybrid_override_pattern")
        if not isinstance(pattern, str) or len(pattern) != depth:
            raise UserError(
                f"{source}: hybrid_override_pattern must have one letter a layer "
                f"(num_hidden_layers={depth})"
            )
        if set(pattern) - set("M*-"):
            raise UserError(f"{source}: hybrid_override_pattern has layers other than M, * and -")
        counts = (pattern.count("*"), pattern.count("-"), pattern.count("M"))
        names = ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel")
        mamba = MambaShape(*map(need, names), chunk=int(fields.get("chunk_size") or 128))
    # Nemotron-H's own config.json says attention_head_dim, Transformers' says head_dim.
    head_dim = fields.get("head_dim") or fields.get("attention_head_dim") or hidden // heads
    return Shape(
        family,
        hidden,
        depth,
        *counts,
        heads=heads,
        kv_heads=fields.get("num_key_value_heads") or heads,
        head_dim=int(head_dim),
        intermediate=need("intermediate_size"),
        gated_mlp=not hybrid,
        vocab=need("vocab_size"),
        context=need("max_position_embeddings"),
        tied=bool(fields.get("tie_word_embeddings")),
        qkv_bias=not hybrid and (family == "qwen2" or bias),
        output_bias=family in ("llama", "qwen3") and bias,
        qk_norm=family == "qwen3",
        mamba=mamba,
        source=source,
    )


def padded_vocab(shape: Shape, tensor: int) -> int:
    """Rows of Megatron's embedding."""
    multiple = VOCAB_MULTIPLE * tensor
    return -(-shape.vocab // multiple) * multiple


def rank_parameters(shape: Shape, tensor: int, pipeline: int) -> int:
    """Parameters on the fullest Megatron rank: the first or last pipeline stage."""
    table = padded_vocab(shape, tensor) * shape.hidden
    tables = table if pipeline > 1 or shape.tied else 2 * table
    layers = shape.matrices / (tensor * pipeline) + shape.replicated / pipeline
    return math.ceil(layers + tables / tensor)


def adapter_parameters(shape: Shape, adapters: LowRank, backend: str) -> int:
    """Of the low-rank adapters: dim (inputs + outputs) of every linear layer that has one.

    Megatron-Core holds q, k, v and gate, up as one layer each.
    """
    h, q, kv, inner = shape.hidden, shape.q_size, shape.kv_size, shape.intermediate
    mamba, attention, mlp = shape.mamba, shape.attention_layers, shape.mlp_layers
    gate = mlp if shape.gated_mlp else 0
    if backend == "megatron":
        layers = {
            "linear_qkv": (h + q + 2 * kv, attention),
            "linear_proj": (q + h, attention),
            "linear_fc1": (h + (2 if gate else 1) * inner, mlp),
            "linear_fc2": (inner + h, mlp),
        }
    else:
        layers = {
            **{"q_proj": (h + q, attention), "o_proj": (q + h, attention)},
            **dict.fromkeys(("k_proj", "v_proj"), (h + kv, attention)),
            **dict.fromkeys(("up_proj", "down_proj"), (h + inner, mlp)),
            "gate_proj": (h + inner, gate),
        }
    layers[HEAD[backend]] = (h + shape.vocab, 1)
    if mamba is not None:
        layers["in_proj"] = (h + mamba.in_proj, shape.mamba_layers)
        layers["out_proj"] = (mamba.inner + h, shape.mamba_layers)
    widths = (width * count for name, (width, count) in layers.items() if adapters.adapts(name))
    return adapters.dim * sum(widths)


def kv_bytes_per_token(shape: Shape, tensor: int = 1, bytes_each: int = BF16) -> int:
    """Cache of one token on one GPU: 2 K D per attention layer; heads below `tensor` repeat."""
    heads = max(1, shape.kv_heads // tensor)
    return 2 * shape.attention_layers * heads * shape.head_dim * bytes_each


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
    scan = 0
    if shape.mamba is not None:
        # State update and readout of every channel, in the chunked form about three times.
        scan = 6 * shape.mamba.inner * shape.mamba.state * shape.mamba_layers
    return 2 * (shape.matrices + shape.vocab * shape.hidden) + scan


def forward_flops(shape: Shape, tokens: float) -> float:
    """Of a row: each token sees those before it (q k^T and p v in every attention layer)."""
    attention = 4 * shape.attention_layers * shape.q_size * tokens / 2
    return tokens * (matrix_flops_per_token(shape) + attention)

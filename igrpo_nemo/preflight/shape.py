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

FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "nemotron_h")
"""The model types whose parameters and memory are known here."""

BF16, FP32 = 2, 4
"""Bytes of a number."""

VOCAB_MULTIPLE = 128
"""Megatron pads the vocabulary to a multiple of this times the tensor parallel size."""

HEAD = {"megatron": "output_layer", "dtensor": "lm_head"}
"""The name of the layer behind the last one."""

_SSD_CHUNK = 128
"""Tokens of a chunk of Mamba-2's scan (`chunk_size` of Nemotron-H's config.json)."""


@dataclass(frozen=True, slots=True)
class MambaShape:
    """A Mamba-2 layer (arXiv 2405.21060): `heads` of `head_dim` channels, `state` values each."""

    heads: int
    head_dim: int
    groups: int
    state: int
    conv_kernel: int
    chunk: int = _SSD_CHUNK

    @property
    def inner(self) -> int:
        """Channels of the layer."""
        return self.heads * self.head_dim

    @property
    def conv(self) -> int:
        """Channels of the causal convolution: x, B and C."""
        return self.inner + 2 * self.groups * self.state


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
    tied: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    mamba: MambaShape | None = None
    source: str = ""

    @property
    def q_size(self) -> int:
        """Channels of the queries."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Channels of the keys, and of the values."""
        return self.kv_heads * self.head_dim


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
    return _described(config)


def model_folder(name: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The folder that holds the model's config.json: as named, or in Hugging Face's cache."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if name.count("/") != 1 or folder.is_absolute():
        return None
    home = Path(environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / "main"
    if not reference.is_file():
        return None
    snapshot = repository / "snapshots" / reference.read_text().strip()
    return snapshot if (snapshot / "config.json").is_file() else None


def differs_from_folder(config: Config, shape: Shape) -> bool:
    """Whether `igrpo.architecture` describes another model than the folder's config.json."""
    described = _described(config, shape.source)
    return described is not None and (described.hidden, described.depth, described.vocab) != (
        shape.hidden,
        shape.depth,
        shape.vocab,
    )


def _described(config: Config, source: str = "igrpo.architecture") -> Shape | None:
    architecture = config.igrpo.architecture
    if architecture is None:
        return None
    return _from_fields(architecture.model_dump(exclude_none=True), source)


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

    family = str(fields["model_type"])
    hidden, heads = need("hidden_size"), need("num_attention_heads")
    # Nemotron-H's own config.json says attention_head_dim, Transformers' says head_dim.
    head_dim = fields.get("head_dim") or fields.get("attention_head_dim") or hidden // heads
    bias = bool(fields.get("attention_bias"))
    shared: dict[str, Any] = {
        "family": family,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": fields.get("num_key_value_heads") or heads,
        "head_dim": int(head_dim),
        "intermediate": need("intermediate_size"),
        "vocab": need("vocab_size"),
        "context": need("max_position_embeddings"),
        "tied": bool(fields.get("tie_word_embeddings")),
        "source": source,
    }
    if family == "nemotron_h":
        return Shape(**shared, **_hybrid(fields, need, source))
    layers = need("num_hidden_layers")
    return Shape(
        **shared,
        depth=layers,
        attention_layers=layers,
        mlp_layers=layers,
        mamba_layers=0,
        gated_mlp=True,
        qkv_bias=family == "qwen2" or bias,
        output_bias=family in ("llama", "qwen3") and bias,
        qk_norm=family == "qwen3",
    )


def _hybrid(fields: Mapping[str, Any], need: Any, source: str) -> dict[str, Any]:
    """What Nemotron-H has beyond the others: a letter a layer, and Mamba-2's widths."""
    pattern = fields.get("hybrid_override_pattern")
    if not isinstance(pattern, str) or len(pattern) != need("num_hidden_layers"):
        raise UserError(
            f"{source}: hybrid_override_pattern must have one letter a layer "
            f"(num_hidden_layers={fields.get('num_hidden_layers')})"
        )
    if set(pattern) - set("M*-"):
        raise UserError(f"{source}: hybrid_override_pattern has layers other than M, * and -")
    mamba = MambaShape(
        heads=need("mamba_num_heads"),
        head_dim=need("mamba_head_dim"),
        groups=need("n_groups"),
        state=need("ssm_state_size"),
        conv_kernel=need("conv_kernel"),
        chunk=int(fields.get("chunk_size") or _SSD_CHUNK),
    )
    return {
        "depth": len(pattern),
        "attention_layers": pattern.count("*"),
        "mlp_layers": pattern.count("-"),
        "mamba_layers": pattern.count("M"),
        "gated_mlp": False,
        "mamba": mamba,
    }


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
    qkv = shape.q_size + 2 * shape.kv_size  # h (H + 2K) D and H D h, and the biases of q, k, v
    attention = h * (qkv + shape.q_size) + (qkv if shape.qkv_bias else 0)
    per_mamba = 0
    if mamba is not None:
        per_mamba = h * (mamba.inner + mamba.conv + mamba.heads)  # in_proj: gate, x B C, step
        per_mamba += mamba.conv * (mamba.conv_kernel + 1)  # the convolution and its bias
        per_mamba += 3 * mamba.heads + mamba.inner  # A, D, the step's bias; the gated norm
        per_mamba += mamba.inner * h  # out_proj
    return Counts(
        attention=attention * shape.attention_layers,
        mlp=(3 if shape.gated_mlp else 2) * h * shape.intermediate * shape.mlp_layers,
        mamba=per_mamba * shape.mamba_layers,
        replicated=replicated,
        embedding=shape.vocab * h,
        head=0 if shape.tied else shape.vocab * h,
    )


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


def adapter_parameters(shape: Shape, adapters: LowRank, backend: str) -> int:
    """Of the low-rank adapters: dim (inputs + outputs) of every linear layer that has one.

    Megatron-Core holds q, k, v and gate, up as one layer each.
    """
    h, q, kv, inner = shape.hidden, shape.q_size, shape.kv_size, shape.intermediate
    gate = shape.mlp_layers if shape.gated_mlp else 0
    mamba, attention, mlp = shape.mamba, shape.attention_layers, shape.mlp_layers
    if backend == "megatron":
        layers = {
            "linear_qkv": (h + q + 2 * kv, attention),
            "linear_proj": (q + h, attention),
            "linear_fc1": (h + (2 if gate else 1) * inner, mlp),
            "linear_fc2": (inner + h, mlp),
        }
    else:
        layers = {
            "q_proj": (h + q, attention),
            "k_proj": (h + kv, attention),
            "v_proj": (h + kv, attention),
            "o_proj": (q + h, attention),
            "gate_proj": (h + inner, gate),
            "up_proj": (h + inner, mlp),
            "down_proj": (inner + h, mlp),
        }
    layers[HEAD[backend]] = (h + shape.vocab, 1)
    if mamba is not None:
        layers["in_proj"] = (h + mamba.inner + mamba.conv + mamba.heads, shape.mamba_layers)
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

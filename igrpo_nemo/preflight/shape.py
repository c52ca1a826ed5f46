"""A model's shape, from the config alone: which layers it has, and how wide they are.

    policy.model_name/config.json | igrpo.architecture | igrpo.model --> Shape

A folder's own config.json wins over `igrpo.architecture`: it is what will be trained. Nothing is
downloaded and no weights are opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igrpo_nemo.config import Config
from igrpo_nemo.errors import UserError

FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "nemotron_h")
"""The model types whose parameters and memory are known here."""

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
    if config.igrpo.model is not None:
        return _small(config)
    folder = model_folder(config.policy.model_name, environ)
    if folder is not None:
        return _from_config_json(folder / "config.json")
    architecture = config.igrpo.architecture
    if architecture is None:
        return None
    return _from_fields(architecture.model_dump(exclude_none=True), "igrpo.architecture")


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
    architecture = config.igrpo.architecture
    if architecture is None or shape.source == "igrpo.architecture":
        return False
    described = _from_fields(architecture.model_dump(exclude_none=True), shape.source)
    return (described.hidden, described.depth, described.vocab) != (
        shape.hidden,
        shape.depth,
        shape.vocab,
    )


def _small(config: Config) -> Shape:
    """The built-in model: a Qwen2 with tied embeddings (`local/model.py`)."""
    model = config.igrpo.model
    assert model is not None
    fields = {
        "model_type": "qwen2",
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "intermediate_size": model.intermediate_size,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": config.policy.max_total_sequence_length,
        "tie_word_embeddings": True,
    }
    return _from_fields(fields, "igrpo.model")


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

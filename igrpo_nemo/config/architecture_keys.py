"""`igrpo.architecture`: a model's shape under the names of its Hugging Face `config.json`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from igrpo_nemo.config.section import Positive, PositiveFloat, Section


class Architecture(Section):
    """`igrpo.architecture`: what preflight and evaluation know of a model without its weights."""

    model_type: Literal["qwen2", "llama", "nemotron_h"]
    """Family."""
    hidden_size: Positive
    """Width."""
    num_hidden_layers: Positive
    """Layers of any kind."""
    num_attention_heads: Positive
    """Attention heads."""
    num_key_value_heads: Positive
    """Key and value heads."""
    head_dim: Positive | None = None
    """Width of a head; null is hidden_size / num_attention_heads."""
    intermediate_size: Positive
    """Width of a feed-forward layer."""
    vocab_size: Positive
    """Rows of the embedding."""
    max_position_embeddings: Positive
    """Context in tokens."""
    tie_word_embeddings: bool = False
    """Embedding and output projection are one matrix."""
    attention_bias: bool = False
    """Query, key and value projections have a bias."""
    rope_theta: PositiveFloat | None = None
    """Base of the rotary frequencies."""
    hybrid_override_pattern: Annotated[str, Field(pattern=r"^[-M*E]+$")] | None = None
    """Nemotron-H: a letter a layer, M for Mamba-2, * for attention, - for feed-forward."""
    mamba_num_heads: Positive | None = None
    """Nemotron-H: heads of a Mamba-2 layer."""
    mamba_head_dim: Positive | None = None
    """Nemotron-H: width of such a head."""
    n_groups: Positive | None = None
    """Nemotron-H: groups of B and C."""
    ssm_state_size: Positive | None = None
    """Nemotron-H: state per channel."""
    conv_kernel: Positive | None = None
    """Nemotron-H: width of the causal convolution."""

"""Small models of several families, for the engine's tests. Nothing is downloaded."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    NemotronHConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from igrpo_nemo.run.tokenizer import build_small_tokenizer
from igrpo_nemo.types import Completion, Stage, StopReason, TrainingRow

_SHAPE: dict[str, Any] = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=128,
)
_MAMBA: dict[str, Any] = dict(
    layers_block_type=["mamba", "attention", "mlp"],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    hidden_size=32,
    intermediate_size=48,
    mamba_num_heads=4,
    mamba_head_dim=16,
    ssm_state_size=8,
    n_groups=2,
    chunk_size=128,
    max_position_embeddings=128,
    use_mamba_kernels=False,
)


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the policy that `tiny_runs` trains."""
    return tiny_runs.tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = ["user: 12+34=46 <think>4,6</think><answer>46</answer> the end of the line"] * 3
    return build_small_tokenizer(texts, 320)


@pytest.fixture(scope="session")
def make_model(tokenizer: PreTrainedTokenizerFast) -> Callable[..., PreTrainedModel]:
    """make_model(family, seed=0): a tiny random model in evaluation mode, biases included."""

    def make(family: str, *, seed: int = 0) -> PreTrainedModel:
        common: dict[str, Any] = dict(
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            initializer_range=0.1,
        )
        config = {
            "qwen2": lambda: Qwen2Config(**_SHAPE, **common, tie_word_embeddings=True),
            "llama": lambda: LlamaConfig(**_SHAPE, **common, tie_word_embeddings=False),
            "qwen3": lambda: Qwen3Config(**_SHAPE, **common, head_dim=16),
            "gemma2": lambda: Gemma2Config(
                **_SHAPE, **common, head_dim=8, final_logit_softcapping=3.0
            ),
            "granite": lambda: GraniteConfig(**_SHAPE, **common, logits_scaling=4.0),
            "nemotron_h": lambda: NemotronHConfig(**_MAMBA, **common),
        }[family]()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config).float().eval()
            for name, parameter in model.named_parameters():
                if name.endswith("proj.bias") or "norm" in name:
                    torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
        return model

    return make


@pytest.fixture
def make_rows(tokenizer: PreTrainedTokenizerFast) -> Callable[..., list[TrainingRow]]:
    """make_rows([(context length, [completion lengths])], seed=0), shuffled."""

    def make(shape: list[tuple[int, list[int]]], seed: int = 0) -> list[TrainingRow]:
        rng = random.Random(seed)

        def tokens(count: int) -> tuple[int, ...]:
            return tuple(rng.randrange(len(tokenizer)) for _ in range(count))

        rows = []
        for number, (context_length, lengths) in enumerate(shape):
            context = tokens(context_length)
            for length in lengths:
                ids = tokens(length)
                completion = Completion("", ids, (0.0,) * length, StopReason.LENGTH)
                rows.append(TrainingRow(f"g{number}", Stage.REFINE, context, completion, 0.0))
        rng.shuffle(rows)
        return rows

    return make

"""Parameter counts against the architectures themselves, built without memory."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cases import cases
from composed import config_of

from igrpo_nemo.errors import UserError
from igrpo_nemo.files import model_folder
from igrpo_nemo.preflight.shape import (
    Shape,
    forward_flops,
    kv_bytes_per_token,
    matrix_flops_per_token,
    rank_parameters,
    shape_of,
    state_bytes_per_sequence,
)

CASES = cases(__file__)


MODELS = (
    "nemotron_h_8b",
    "deepseek_r1_distill_qwen_7b",
    "deepseek_r1_distill_qwen_14b",
    "openmath_nemotron_7b",
    "openmath_nemotron_14b",
    "openreasoning_nemotron_7b",
)
CLUSTER = ["engine=nemo_rl", "cluster=a100_2x8"]


def of_model(name: str) -> Shape:
    shape = shape_of(config_of(f"model={name}", *CLUSTER), {})
    assert shape is not None
    return shape


def built(fields: dict[str, Any]) -> int:
    """Parameters of the architecture that Transformers builds from the same config.json."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(fields)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_counts_equal_the_architecture_on_the_meta_device(name):
    architecture = config_of(f"model={name}", *CLUSTER).igrpo.architecture
    assert architecture is not None
    fields = architecture.model_dump(exclude_none=True)
    fields.pop("rope_theta", None)  # changes no parameter, and its place differs by version
    assert of_model(name).parameters == built(fields)


SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 320,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_a_folders_config_json_is_counted_exactly(tmp_path, family, tied):
    fields = {"model_type": family, **SMALL, "tie_word_embeddings": tied, "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    shape = shape_of(config_of(f"policy.model_name={tmp_path}"), {})
    assert shape is not None and shape.source.endswith("config.json")
    assert shape.parameters == built(fields)


def test_a_folder_wins_over_the_architecture_of_the_group(tmp_path):
    fields = {"model_type": "llama", **SMALL}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    group = ["model=openmath_nemotron_7b", f"policy.model_name={tmp_path}"]
    shape = shape_of(config_of(*CLUSTER, *group), {})
    assert shape is not None and shape.hidden == 64


def test_a_model_is_found_in_hugging_faces_cache(tmp_path):
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    assert model_folder("owner/name", {"HF_HOME": str(tmp_path)}) == snapshot
    assert model_folder("owner/other", {"HF_HOME": str(tmp_path)}) is None


@pytest.mark.parametrize(("content", "reason"), CASES["broken"])
def test_a_broken_config_json_is_one_line(tmp_path, content, reason):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=reason.replace("*", r"\*")) as caught:
        shape_of(config_of(f"policy.model_name={tmp_path}"), {})
    assert "\n" not in str(caught.value)


def test_families_that_are_not_known_have_no_shape(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert shape_of(config_of(f"policy.model_name={tmp_path}"), {}) is None


def test_bytes_and_operations_of_the_7b_model():
    """By hand: 2 (k, v) x 28 layers x 4 heads x 128 x 2 bytes; 6.53e9 + 0.54e9 matrix entries."""
    shape = of_model("openmath_nemotron_7b")
    assert kv_bytes_per_token(shape) == 2 * 28 * 4 * 128 * 2
    assert kv_bytes_per_token(shape, tensor=2) == kv_bytes_per_token(shape) // 2
    assert kv_bytes_per_token(shape, tensor=8) == kv_bytes_per_token(shape, tensor=4)
    table = 152_064 * 3584
    replicated = 57 * 3584
    assert matrix_flops_per_token(shape) == 2 * (shape.parameters - table - replicated)
    # Causal attention: token t sees t others, on average half of them.
    short, long = forward_flops(shape, 1000), forward_flops(shape, 2000)
    assert long - 2 * short == pytest.approx(4 * 28 * 3584 * 1000 * 1000)


def test_recurrent_state_of_nemotron_h():
    """24 layers x (128 x 64 channels x 128 states x 4 bytes + 10,240 channels x 3 x 2 bytes)."""
    shape = of_model("nemotron_h_8b")
    expected = 24 * (8192 * 128 * 4 + 10_240 * 3 * 2)
    assert state_bytes_per_sequence(shape) == expected
    assert state_bytes_per_sequence(of_model("openmath_nemotron_7b")) == 0


def test_the_fullest_rank_holds_its_share():
    shape = of_model("openmath_nemotron_14b")
    total = shape.parameters
    assert rank_parameters(shape, 4, 1) == pytest.approx(total / 4, rel=0.001)
    assert rank_parameters(shape, 4, 2) > total / 8

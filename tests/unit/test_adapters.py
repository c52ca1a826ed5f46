"""DTensor's low-rank adapters become a model: merged into the one that they were trained on."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from igrpo_nemo.chain.checkpoints import Checkpoint, Form, find_checkpoint
from igrpo_nemo.chain.conversion import conversion_command, convert
from igrpo_nemo.errors import UserError


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    generator = torch.Generator().manual_seed(0)
    weights = {
        "model.layers.0.self_attn.q_proj.weight": torch.randn(6, 4, generator=generator),
        "model.layers.0.self_attn.q_proj.bias": torch.ones(6),
        "model.norm.weight": torch.ones(4),
    }
    save_file({k: v.bfloat16() for k, v in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def run(tmp_path, base):
    """A finished run whose last step holds what Automodel's checkpointer writes of adapters."""
    run = tmp_path / "run"
    model = run / "checkpoints" / "step_3" / "policy" / "weights" / "model"
    model.mkdir(parents=True)
    (run / "config.yaml").write_text("{}")
    (run / "finished").touch()
    (run / "checkpoints" / "step_3" / "config.yaml").write_text(
        yaml.safe_dump({"policy": {"model_name": str(base)}})
    )
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    parts = {name.format("A"): torch.full((2, 4), 0.5), name.format("B"): torch.full((6, 2), 0.25)}
    save_file(parts, model / "adapter_model.safetensors")
    settings = {"r": 2, "lora_alpha": 8, "use_dora": False}
    (model / "adapter_config.json").write_text(json.dumps(settings))
    return run


def test_adapters_are_merged_as_they_were_sampled_with(run, base):
    found = find_checkpoint(run, "last")
    assert (found.form, found.weights.name) == (Form.ADAPTERS, "model")
    assert convert(run, "last")["form"] == "low-rank adapters"
    merged = load_file(run / "hf" / "last" / "model.safetensors")
    before = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    # B A is 0.25 in every place, times alpha / r = 4.
    assert torch.equal(merged[name], (before[name].float() + 1.0).bfloat16())
    assert all(torch.equal(merged[k], before[k]) for k in before.keys() - {name})
    assert (run / "hf" / "last" / "config.json").is_file()


def test_another_base_model_is_refused(run, base):
    save_file({"model.norm.weight": torch.ones(4)}, base / "model.safetensors")
    with pytest.raises(UserError, match=r"has no model.layers.0.self_attn.q_proj.weight"):
        convert(run, "last")
    (base / "model.safetensors").unlink()
    with pytest.raises(UserError, match="is no folder with"):
        convert(run, "last")
    assert not (run / "hf" / "last").exists()


def test_megatrons_adapters_go_through_nemo_rls_converter(tmp_path, base, monkeypatch):
    step = tmp_path / "step_1"
    step.mkdir()
    policy = {"model_name": str(base), "megatron_cfg": {"peft": {"enabled": True}}}
    (step / "config.yaml").write_text(yaml.safe_dump({"policy": policy}))
    checkpoint = Checkpoint(1, step, Form.MEGATRON, step / "policy" / "weights" / "iter_0000000")
    root = tmp_path / "nemo-rl"
    monkeypatch.setenv("NRL_MEGATRON_CHECKPOINT_DIR", str(tmp_path / "megatron"))
    with pytest.raises(UserError, match="is not here, into which NeMo-RL merges"):
        conversion_command(checkpoint, tmp_path / "out", root)
    from igrpo_nemo.nemo.converted_model import converted_folder

    first = converted_folder(policy) / "iter_0000000"
    first.mkdir(parents=True)
    (first / "run_config.yaml").touch()
    command = conversion_command(checkpoint, tmp_path / "out", root)
    assert command[0].endswith("examples/converters/convert_lora_to_hf.py")
    assert dict(zip(command[1::2], command[2::2], strict=True)) == {
        "--base-ckpt": str(first),
        "--adapter-ckpt": str(checkpoint.weights.resolve()),
        "--hf-model-name": str(base),
        "--hf-ckpt-path": str(tmp_path / "out"),
    }
    with pytest.raises(UserError, match="leave --gpus out"):
        conversion_command(checkpoint, tmp_path / "out", root, gpus=8)

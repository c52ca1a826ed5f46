"""A model is converted to Megatron-Core's form once: whole, or not there at all."""

from __future__ import annotations

import ast
import hashlib
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from igrpo_nemo.errors import UserError
from igrpo_nemo.nemo import converted_model
from igrpo_nemo.nemo.converted_model import FIRST, VARIABLE, converted_once

pytestmark = pytest.mark.either_tree


@pytest.fixture
def policy(tmp_path, monkeypatch) -> dict[str, Any]:
    """NeMo-RL's section for a model in a folder, with a shared disk of its own."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return {"model_name": str(model), "megatron_cfg": {"enabled": True}}


def nemo_looks(policy: dict[str, Any]) -> tuple[Path, bool]:
    """NeMo-RL's own `validate_model_paths`: where it looks, and whether it finds a conversion.

    Taken out of its module, which cannot be imported without Megatron-Core.
    """
    from nemo_rl.models.policy import utils

    source = Path(utils.__file__).parents[1] / "megatron" / "setup.py"
    wanted = ("_canonicalize_hf_config_overrides", "_get_hf_config_overrides_hash",
              "validate_model_paths")  # fmt: skip
    nodes = [
        node
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name in wanted
    ]
    assert len(nodes) == len(wanted)
    names = {
        "os": os, "json": json, "hashlib": hashlib, "Any": Any, "PolicyConfig": dict,
        "get_megatron_checkpoint_dir": utils.get_megatron_checkpoint_dir,
    }  # fmt: skip
    exec(compile(ast.Module(nodes, []), str(source), "exec"), names)
    _, path, there = names["validate_model_paths"](policy)
    return Path(path), there


def convert(policy: dict[str, Any], *, whole: bool = True) -> None:
    """What a worker does that finds no conversion: Megatron-Bridge's files, in its order."""
    path, there = nemo_looks(policy)
    if there:
        return
    (path / FIRST).mkdir(parents=True)
    (path / FIRST / "__0_0.distcp").touch()
    with (path.parent / "conversions").open("a") as log:
        log.write(f"{os.getpid()}\n")
    if whole:
        (path / FIRST / "run_config.yaml").write_text("model: {}\n")


def conversions(tmp_path: Path) -> list[str]:
    [log] = (tmp_path / "hf").rglob("conversions")
    return log.read_text().split()


@pytest.mark.parametrize("overrides", [{}, {"rope_theta": 1e6}])
def test_nemo_rl_looks_where_the_conversion_is_guarded(policy, overrides):
    policy["hf_config_overrides"] = overrides
    with converted_once(policy):
        convert(policy)
        path, there = nemo_looks(policy)
        assert there and not converted_model.is_whole(path)  # until the set-up is through
    assert converted_model.is_whole(path)
    with converted_once(policy):
        assert nemo_looks(policy) == (path, True)
    assert VARIABLE not in os.environ


def killed_while_converting(policy: dict[str, Any]) -> None:
    with converted_once(policy):
        convert(policy, whole=False)
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_job_left_is_converted_anew(policy, tmp_path):
    process = multiprocessing.get_context("fork").Process(
        target=killed_while_converting, args=[policy]
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    [left] = (tmp_path / "hf").rglob(FIRST)
    assert (left / "__0_0.distcp").exists()  # which NeMo-RL alone would load
    with converted_once(policy):
        assert not left.exists()
        convert(policy)
    assert len(conversions(tmp_path)) == 2 and (left / "run_config.yaml").exists()


def convert_slowly(policy: dict[str, Any], started: Any) -> None:
    with converted_once(policy):
        convert(policy, whole=False)
        started.set()
        time.sleep(0.5)
        path, _ = nemo_looks(policy)
        (path / FIRST / "run_config.yaml").write_text("model: {}\n")


def test_a_second_run_waits_and_takes_what_the_first_one_made(
    policy, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(converted_model, "_PAUSE_S", 0.05)
    context = multiprocessing.get_context("fork")
    started = context.Event()
    first = context.Process(target=convert_slowly, args=[policy, started])
    first.start()
    assert started.wait(60)
    with converted_once(policy):
        convert(policy)
    first.join(60)
    assert conversions(tmp_path) == [str(first.pid)]
    assert f"waiting for pid {first.pid}" in capsys.readouterr().out


def test_a_conversion_that_never_ends_is_said(policy, monkeypatch):
    monkeypatch.setattr(converted_model, "WAIT_S", 0)
    with converted_once(policy):
        monkeypatch.delenv(VARIABLE)  # as another process has it
        with pytest.raises(UserError, match=r"is being converted by .*remove .*\.conversion"):
            converted_once(policy).__enter__()
        monkeypatch.setenv(VARIABLE, "")


def test_other_weights_of_the_same_name_are_another_conversion(policy):
    with converted_once(policy):
        convert(policy)
    (Path(policy["model_name"]) / "model.safetensors").write_text("trained on")
    with converted_once(policy):
        assert not nemo_looks(policy)[1]


def test_a_model_that_is_not_converted_is_left_alone(policy, tmp_path):
    for other in ({"megatron_cfg": {"enabled": False}}, {"pretrained_checkpoint": {"path": "x"}}):
        with converted_once({**policy, **other}):
            assert VARIABLE not in os.environ
    assert not (tmp_path / "hf").exists()

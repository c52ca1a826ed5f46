"""The seam: who gets which rollout, what is put back, what travels, what is checked."""

from __future__ import annotations

import importlib
import os
import pickle
from pathlib import Path

import pytest

from igrpo_nemo.errors import UserError
from igrpo_nemo.feedback import BestDraft
from igrpo_nemo.nemo import names, seam
from igrpo_nemo.nemo.rollout import TwoStageMap
from igrpo_nemo.nemo.seam import RolloutSpec, StepClock

SPEC = RolloutSpec(BestDraft(4, 2), {"accuracy": 1.0})


@pytest.fixture(autouse=True)
def _nothing_stays_installed():
    yield
    while seam._users:
        seam.uninstall()


def _names():
    return {
        (module, name): getattr(importlib.import_module(module), name)
        for module, names in seam.CALLERS.items()
        for name in names
    }


def test_this_nemo_rl_is_what_the_package_stands_on():
    names.check_nemo_rl()


def test_nemo_rl_gets_its_own_functions_back():
    """Behind the outermost block, and behind an error."""
    before = _names()
    with pytest.raises(RuntimeError), seam.installed():
        with seam.installed():
            pass
        assert all(function is not before[key] for key, function in _names().items())
        raise RuntimeError
    assert _names() == before


@pytest.mark.parametrize("name", seam.ROLLOUTS)
def test_the_type_of_the_map_decides(monkeypatch, name):
    """Keywords as the trainer passes them, positions as validation does; a dict gets NeMo-RL's."""
    grpo = importlib.import_module("nemo_rl.algorithms.grpo")
    called = []
    monkeypatch.setattr(grpo, name, _recorder(getattr(grpo, name), called))
    ours = lambda task_to_env, call: called.append(("ours", call))  # noqa: E731
    monkeypatch.setattr(TwoStageMap, "roll_out", ours)
    plain, marked = {"math": 1}, TwoStageMap({"math": 1}, SPEC)
    with seam.installed():
        getattr(grpo, name)("generation", "batch", "tokenizer", plain, max_seq_len=9, greedy=False)
        getattr(grpo, name)(
            policy_generation="generation",
            input_batch="batch",
            tokenizer="tokenizer",
            task_to_env=marked,
            max_seq_len=9,
            max_rollout_turns=1,
            greedy=False,
        )
    assert called[0] == ("theirs", ("generation", "batch", "tokenizer", plain))
    who, call = called[1]
    assert who == "ours"
    assert call.arguments["task_to_env"] is marked
    assert call.arguments["input_batch"] == "batch"
    assert call.concurrently is (name == seam.ROLLOUTS[1])


def _recorder(original, called):
    import functools

    @functools.wraps(original)
    def record(*args, **kwargs):
        called.append(("theirs", args))

    return record


def test_a_map_that_arrives_in_another_process_installs_the_seam():
    packed = pickle.dumps(TwoStageMap({"math": 1}, SPEC, StepClock(7)))
    before = _names()
    arrived = pickle.loads(packed)
    assert all(function is not before[key] for key, function in _names().items())
    assert isinstance(arrived, TwoStageMap)
    assert (dict(arrived), arrived.spec, arrived.clock.finished) == ({"math": 1}, SPEC, 7)
    assert arrived.prefetcher is None


def test_it_arrives_in_a_ray_process_with_the_seam(ray_cluster):
    """As NeMo-RL's collector and data-plane actor get it."""
    import ray

    @ray.remote
    def names_in_place(task_to_env):
        grpo = importlib.import_module("nemo_rl.algorithms.grpo")
        collector = importlib.import_module("nemo_rl.algorithms.async_utils.trajectory_collector")
        functions = [grpo.run_multi_turn_rollout, collector.run_async_multi_turn_rollout]
        return type(task_to_env).__name__, [hasattr(f, "__wrapped__") for f in functions]

    arrived = ray.get(names_in_place.remote(TwoStageMap({"math": 1}, SPEC)))
    assert arrived == ("TwoStageMap", [True, True])
    plain = ray.get(names_in_place.options(num_cpus=0.5).remote({"math": 1}))
    assert plain[0] == "dict"


def test_another_version_is_refused(monkeypatch):
    info = importlib.import_module("nemo_rl.package_info")
    monkeypatch.setattr(info, "VERSION", (0, 8, 1, ""))
    with pytest.raises(UserError, match=r"NeMo-RL 0\.8\.1 is installed.*0\.7"):
        names.check_nemo_rl()


def test_an_old_python_is_told_so(monkeypatch):
    """pydantic would refuse NeMo-RL's configs with a page of its own."""
    import sys
    import typing

    class Standard:
        __module__ = "typing"

    monkeypatch.setattr(sys, "version_info", (3, 11, 9, "final", 0))
    monkeypatch.setattr(typing, "TypedDict", Standard)
    with pytest.raises(UserError, match="Python 3.12 or newer, this is 3.11"):
        names.check_nemo_rl()


def test_the_command_line_says_what_is_missing(tmp_path):
    """Without NeMo-RL's source, in one line, before there is a run folder: below Python 3.12 that
    Python is too old, which would remain when the source is there; else how to get the source."""
    import subprocess
    import sys

    words = ["engine=nemo_rl_local", "experiment=demo", f"logger.log_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-m", "igrpo_nemo", "train", *words],
        env={"PATH": os.defpath, "PYTHONPATH": str(Path(names.__file__).parents[2])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    if sys.version_info < (3, 12):
        assert "Python 3.12 or newer" in line
        assert "engine=local" in line
    else:
        assert "NeMo-RL cannot be imported" in line
        assert "docs/install.md" in line
    assert not (tmp_path / "run").exists()


def test_a_missing_name_and_a_changed_signature_are_named(monkeypatch):
    rollouts = importlib.import_module("nemo_rl.experience.rollouts")
    monkeypatch.delattr(rollouts, "calculate_rewards")
    monkeypatch.setattr(rollouts, "generate_responses", lambda policy_generation, batch: None)
    with pytest.raises(UserError) as raised:
        names.check_nemo_rl()
    message = str(raised.value)
    assert "nemo_rl.experience.rollouts has no calculate_rewards" in message
    assert "generate_responses takes no generation_input_data" in message


def test_a_missing_attribute_is_named(monkeypatch):
    """Without these, routing would quietly do nothing."""
    wanted = names.needed()
    groups, generation = "nemo_rl.distributed.worker_groups", "nemo_rl.models.generation"
    generation = f"{generation}.vllm.vllm_generation"
    wanted["attributes"][groups]["RayWorkerGroup"].append("data_parallel_size")
    wanted["attributes"][generation]["VllmGeneration"][1] = "next_shard"
    monkeypatch.setattr(names, "needed", lambda: wanted)
    with pytest.raises(UserError) as raised:
        names.check_nemo_rl()
    message = str(raised.value)
    assert "worker_groups.RayWorkerGroup has no data_parallel_size" in message
    assert "vllm_generation.VllmGeneration has no next_shard" in message
    assert "dp_size" not in message and "no worker_group" not in message

"""The guard as a contract with the NeMo-RL at hand: what is relied on, and what would break
without a word."""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path

import nemo_schema
import pytest
from nemo_runs import as_nemo_rl_takes_it

from igrpo_nemo.config import load_config, with_problems
from igrpo_nemo.config.nemo_schema import nemo_schema as snapshot
from igrpo_nemo.config.section import at, shown
from igrpo_nemo.errors import UserError
from igrpo_nemo.nemo import names

pytestmark = pytest.mark.either_tree


def _is_release():
    return importlib.import_module("nemo_rl.package_info").VERSION[:2] == names.RELEASE


def test_this_nemo_rl_is_what_the_package_stands_on():
    """Without a word for the release that was tested; else with a warning that names what was."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        names.check_nemo_rl()
    ours = [str(each.message) for each in said if "igrpo-nemo" in str(each.message)]
    assert len(ours) == (0 if _is_release() else 1)
    assert all("main of 2026-08-22 (7ea279abf); this one calls itself 0.6.0" in o for o in ours)


@pytest.mark.parametrize(
    ("version", "says"),
    [((0, 9, 0), "NeMo-RL 0.9.0 is installed"), ((0, 8, 1), "calls itself 0.8.1: every name")],
)
def test_another_version_is_refused_or_named(monkeypatch, version, says):
    """0.8 passes where all that is relied on is there; nobody has seen what else it changes."""
    info = importlib.import_module("nemo_rl.package_info")
    monkeypatch.setattr(info, "VERSION", (*version, ""))
    with (
        pytest.raises(UserError, match=says)
        if version > (0, 9)
        else pytest.warns(UserWarning, match=says)
    ):
        names.check_nemo_rl()


def test_a_release_before_0_7_is_refused(monkeypatch):
    info = importlib.import_module("nemo_rl.package_info")
    monkeypatch.setattr(info, "VERSION", (0, 6, 0, ""))
    monkeypatch.setattr(names, "_is_main", lambda: False)
    with pytest.raises(UserError, match=r"NeMo-RL 0\.6\.0 is installed.*needs 0\.7 or 0\.8"):
        names.check_nemo_rl()


SILENT = {
    "grpo": [
        ("timeout.check_save()", "timeout.is_over()", "grpo has no timeout.check_save()"),
        ("step_finished=True", "last=True", "grpo has no step_finished=True"),
        ("checkpointer.init", "checkpointer.move", "grpo calls checkpointer.move_tmp_checkpoint"),
        ("run_multi_turn_rollout", "run_batch_rollout", "grpo rolls out by run_batch_rollout"),
    ],
    "grpo_sync": [('["truncated"]', '["cut"]', 'grpo_sync has no ["truncated"]')],
    "async_utils.trajectory_collector": [
        ("run_async_multi", "run_streamed_multi", "trajectory_collector has no run_async_multi"),
    ],
    "loss.loss_functions": [('"approx_entropy"', '"entropy"', 'has no "approx_entropy"')],
}


@pytest.mark.parametrize(
    ("module", "change"), [(module, each) for module, all in SILENT.items() for each in all]
)
def test_what_would_break_without_a_word_is_named(monkeypatch, module, change):
    """A source that differs where nothing would fail: a stop unheard, a stage passed by."""
    old, new, says = change
    getsource = names.inspect.getsource

    def changed(value):
        source = getsource(value)
        named = getattr(value, "__name__", "") == f"nemo_rl.algorithms.{module}"
        return source.replace(old, new) if named else source

    monkeypatch.setattr(names.inspect, "getsource", changed)
    with pytest.raises(UserError) as raised:
        names.check_nemo_rl()
    assert says in str(raised.value)


def test_a_renamed_field_of_the_saved_state_is_named(monkeypatch):
    grpo = importlib.import_module("nemo_rl.algorithms.grpo")
    fields = {name: int for name in grpo.GRPOSaveState.__annotations__ if name != "total_steps"}
    monkeypatch.setattr(grpo.GRPOSaveState, "__annotations__", fields)
    with pytest.raises(UserError, match="GRPOSaveState has no total_steps"):
        names.check_nemo_rl()


def test_keys_that_this_nemo_rl_ignores_are_those_that_are_refused():
    """Of the keys that a config may have (0.7's) the newer one lacks exactly these."""
    live = nemo_schema.schema()
    lacking = snapshot().names.difference(*live.values())
    gone = set(names.needed()["gone"])
    assert gone <= snapshot().names
    assert lacking == (set() if _is_release() else gone)
    values = {"policy": {"megatron_cfg": {"use_linear_ce_fusion_loss": True}}}
    if not _is_release():
        with pytest.raises(UserError, match="use_linear_ce_fusion_loss is a key of NeMo-RL 0.7"):
            names.check_keys(values)
        assert set(nemo_schema.newer(live)["newer"]) == snapshot().newer
        assert set(nemo_schema.newer(live)["newer_open"]) == snapshot().newer_open
    else:
        names.check_keys(values)


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("grpo.val_start_at", "grpo.val_start_at=5"),
        ("reward_penalties", "reward_penalties.penalize_malformed_think_tag=false"),
        (
            "policy.generation.refit_cfg",
            "policy.generation.refit_cfg.sparse.storage.s3_bucket=b",
        ),
        (
            "policy.megatron_cfg.use_gloo_process_groups",
            "policy.megatron_cfg.use_gloo_process_groups=true",
        ),
    ],
)
def test_a_key_that_only_a_newer_nemo_rl_has_is_set_where_it_is_installed(path, word, tmp_path):
    """It reaches NeMo-RL's own typed config there; elsewhere it is refused in one line."""
    base = ["engine=nemo_rl", "cluster=a100_2x8", "policy.model_name=/models/7b"]
    config = with_problems(load_config([*base, word]), 7_500)
    key, _, value = word.partition("=")
    assert shown(at(config.to_dict(), key)) == value
    if _is_release():
        with pytest.raises(UserError) as raised:
            names.check_keys(config.to_dict())
        found = importlib.import_module("nemo_rl.package_info").__version__
        says = f"{path} is no key of the installed NeMo-RL {found}: leave it out"
        assert str(raised.value) == says
    else:
        names.check_keys(config.to_dict())
        master = as_nemo_rl_takes_it(config, tmp_path).model_dump()
        assert shown(at(master, key)) == value


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
    wanted["names"][groups]["RayWorkerGroup"].append(".data_parallel_size")
    wanted["names"][generation]["VllmGeneration"][1] = ".next_shard"
    monkeypatch.setattr(names, "needed", lambda: wanted)
    with pytest.raises(UserError) as raised:
        names.check_nemo_rl()
    message = str(raised.value)
    assert "worker_groups.RayWorkerGroup has no data_parallel_size" in message
    assert "vllm_generation.VllmGeneration has no next_shard" in message
    assert "dp_size" not in message and "no worker_group" not in message

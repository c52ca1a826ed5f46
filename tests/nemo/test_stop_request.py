"""The stop file reaches NeMo-RL's trainer: a checkpoint, exit 0, no marker; then it goes on."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import nemo_runs
import pytest
from nemo_rl.utils.timer import TimeoutChecker

from igrpo_nemo.nemo import launch
from igrpo_nemo.nemo.resume import stop_requests
from igrpo_nemo.run.stop import VARIABLE, StopFile


def test_a_checker_says_stop_once_the_file_is_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("igrpo_nemo.run.stop._PERIOD_S", 0.0)
    original, path = TimeoutChecker.check_save, tmp_path / "stop"
    checker = TimeoutChecker(timeout=None, fit_last_save_time=True)
    with stop_requests(StopFile(path)) as stop:
        assert not checker.check_save() and not stop.given
        path.touch()
        assert checker.check_save() and stop.given
        assert not checker.check_save(), "NeMo-RL's own answers yes once"
    assert TimeoutChecker.check_save is original
    assert capsys.readouterr().out == f"{path}: saving after this step\n"


def test_nemo_rls_own_limit_counts_as_given_and_errors_restore_it():
    original = TimeoutChecker.check_save
    with pytest.raises(RuntimeError), stop_requests(StopFile()) as stop:
        assert not TimeoutChecker(timeout=None).check_save() and not stop.given
        assert TimeoutChecker(timeout="00:00:00:00").check_save() and stop.given
        raise RuntimeError
    assert TimeoutChecker.check_save is original


@pytest.mark.parametrize(
    ("steps", "dynamic", "stopped", "finished"),
    [
        (10, False, False, True),
        (10, False, True, True),
        (9, False, False, False),
        (9, True, False, True),
        (9, True, True, False),
    ],
)
def test_when_a_run_is_finished(steps, dynamic, stopped, finished):
    for sampling, keep in ((dynamic, None), (False, 0.2 if dynamic else None)):
        grpo, igrpo = SimpleNamespace(use_dynamic_sampling=sampling), SimpleNamespace()
        igrpo.curriculum_keep = keep
        config = SimpleNamespace(grpo=grpo, igrpo=igrpo)
        assert launch.is_finished(config, steps, 10, stopped) is finished


@pytest.mark.either_tree
def test_a_run_that_is_stopped_goes_on(ray_cluster, policy_folder, tmp_path, monkeypatch):
    """One job meets `checkpoint_must_save_by`, one the stop file, one ends the run: each returns 0
    with a checkpoint. The log and the summary of the last are those of the whole run."""
    saving = ["checkpointing.enabled=true", "checkpointing.save_period=9"]
    saving += ["grpo.max_num_steps=3", "grpo.val_at_start=true"]
    folder, stop = tmp_path / "run", tmp_path / "stop"
    summaries = []

    def job(steps, *options):
        nemo_runs.train(nemo_runs.tiny_config(policy_folder, folder, *saving, *options))
        assert (folder / "finished").exists() is (steps == 3)
        assert (folder / "checkpoints" / f"step_{steps}").is_dir()
        assert len(nemo_runs.metrics(folder)) == steps
        summaries.append(json.loads((folder / "summary.json").read_text()))

    job(1, "checkpointing.checkpoint_must_save_by='00:00:00:00'")
    monkeypatch.setenv(VARIABLE, str(stop))
    stop.touch()
    job(2)
    stop.unlink()
    job(3)
    job(3)
    assert (folder / "finished").read_text() == "3\n"
    assert (folder / "plan.json").read_text() == '{"total_steps": 3}\n'
    logged = nemo_runs.metrics(folder)
    seconds = list(itertools.accumulate(each["timing/step"] for each in logged))
    hours = [3600 * each["perf/gpu_hours"] for each in logged]
    assert hours == pytest.approx(seconds)
    [validated] = nemo_runs.metrics(folder, "val")
    _, before, summary, again = summaries
    assert [each["finished"] for each in summaries] == [False, False, True, True]
    assert summary["completions"] == sum(each["igrpo/completions"] for each in logged) == 3 * 64
    assert summary["training_seconds"] == pytest.approx(seconds[-1])
    assert summary["seconds"] > before["seconds"] + seconds[-1] - seconds[1]
    assert summary["val_accuracy_start"] == summary["val_accuracy_end"] == validated["val/accuracy"]
    assert again == summary


def test_a_trainer_that_gives_up_is_a_failure(
    ray_cluster, policy_folder, tmp_path, monkeypatch, capsys
):
    """NeMo-RL's asynchronous trainer prints its errors and returns: such a run is not resumed."""
    from igrpo_nemo.nemo import setup

    set_up = setup.set_up

    def broken(*arguments):
        parts = set_up(*arguments)
        parts.run_trainer = lambda: None
        return parts

    monkeypatch.setattr(setup, "set_up", broken)
    config = nemo_runs.tiny_config(policy_folder, tmp_path / "run")
    with nemo_runs.shared_environments():
        assert launch.train(config) == 1
    assert not (tmp_path / "run" / "finished").exists()
    expected = "NeMo-RL's trainer ended after step 0 of 2 without having been asked to"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("prefetch", ["off", "fused"])
def test_the_last_step_is_saved_where_dynamic_sampling_used_the_data_up(
    ray_cluster, policy_folder, tmp_path, prefetch
):
    """Steps that drew two batches: fewer steps than batches, and none of NeMo-RL's own saves. With
    one more epoch the run goes on where it was, and is not validated as a new one."""
    base = [
        "objective=dapo",
        f"igrpo.draft_prefetch={prefetch}",
        "grpo.val_at_start=true",
        "grpo.use_dynamic_sampling=true",
        "grpo.dynamic_sampling_max_gen_batches=20",
        "grpo.max_num_steps=1000",
        "grpo.num_prompts_per_step=4",
        "igrpo.num_refinements=2",
        "data.train.num_problems=40",
        "checkpointing.enabled=true",
        "checkpointing.save_period=1000",
    ]
    once, twice = (
        nemo_runs.tiny_config(policy_folder, tmp_path / "run", *base, f"grpo.max_num_epochs={n}")
        for n in (1, 2)
    )
    nemo_runs.train(once)
    logged = nemo_runs.metrics(tmp_path / "run")
    steps = len(logged)
    assert 0 < steps < 10
    drawn = [each["igrpo/dynamic_sampling_draws"] for each in logged]
    draw = 4 * once.grpo.batch_multiplier * (once.igrpo.num_drafts + 2)
    assert [each["igrpo/completions"] for each in logged] == [draw * count for count in drawn]
    saved = tmp_path / "run" / "checkpoints" / f"step_{steps}"
    assert (saved / "train_dataloader.pt").exists() and (saved / "policy" / "weights").exists()
    info = json.loads((saved / "training_info.json").read_text())
    assert info["total_steps"] == steps and info["current_epoch"] == 1
    assert (tmp_path / "run" / "finished").read_text() == f"{steps}\n"
    nemo_runs.train(twice)
    assert steps < len(nemo_runs.metrics(tmp_path / "run"))
    assert len(nemo_runs.metrics(tmp_path / "run", "val")) == 1

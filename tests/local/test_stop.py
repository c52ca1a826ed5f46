"""Signals, the stop file and the time limit end a run with its state saved; the marker says it is
done."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_runs
import torch
import yaml

from igrpo_nemo.config import load_config
from igrpo_nemo.errors import UserError
from igrpo_nemo.local.checkpoint import seal
from igrpo_nemo.local.trainer import train
from igrpo_nemo.run.stop import (
    EXIT_INTERRUPTED,
    SIGNALS,
    VARIABLE,
    InterruptFlag,
    StopFile,
    TimeLimit,
)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_flag_and_says_so_once(number):
    lines = []
    with InterruptFlag(announce=lines.append) as flag:
        assert not flag.requested
        signal.raise_signal(number)
        assert flag.requested
        signal.raise_signal(signal.SIGTERM)
    assert lines == [
        f"{number.name}: finishing what is being computed, then saving; press again to stop at once"
    ]


def test_the_second_sigint_stops_at_once_and_other_signals_never_do():
    lines = []
    with InterruptFlag(announce=lines.append):
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert len(lines) == 1 and lines[0].startswith("SIGUSR1: ")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_handlers_are_restored_even_after_an_error():
    def mine(number, frame):
        pass

    before = signal.signal(signal.SIGUSR1, mine)
    try:
        others = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
        with pytest.raises(RuntimeError), InterruptFlag():
            assert signal.getsignal(signal.SIGUSR1) is not mine
            raise RuntimeError
        assert signal.getsignal(signal.SIGUSR1) is mine
        assert others == [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_outside_the_main_thread_it_is_inert():
    before = [signal.getsignal(number) for number in SIGNALS]
    inside = []

    def body():
        with InterruptFlag() as flag:
            inside.extend(signal.getsignal(number) for number in SIGNALS)
            assert not flag.requested
            inside.append("left")

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert inside == [*before, "left"]


def test_a_forked_worker_is_still_killed_by_sigterm():
    with InterruptFlag(announce=lambda line: None) as flag:
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.05)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert not flag.requested


def test_a_process_ends_with_its_own_exit_code_and_one_line():
    program = (
        "import sys, time\n"
        "from igrpo_nemo.run.stop import EXIT_INTERRUPTED, InterruptFlag\n"
        "with InterruptFlag() as flag:\n"
        "    print('ready', flush=True)\n"
        "    while not flag.requested: time.sleep(0.01)\n"
        "sys.exit(EXIT_INTERRUPTED)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == EXIT_INTERRUPTED == 75
    assert errors.strip() == (
        "SIGTERM: finishing what is being computed, then saving; press again to stop at once"
    )


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_stop_file_is_looked_at_once_a_second_and_remembered(tmp_path):
    path, clock = tmp_path / "stop", Clock()
    stop = StopFile(path, clock)
    assert not stop
    path.touch()
    clock.now = 0.9
    assert not stop
    clock.now = 1.0
    assert stop
    path.unlink()
    clock.now = 9.0
    assert stop


def test_the_environment_names_the_file(tmp_path):
    assert not StopFile.of({}) and not StopFile.of({VARIABLE: ""})
    assert StopFile.of({VARIABLE: str(tmp_path)}).path == tmp_path
    assert not StopFile(tmp_path / "file" / "in" / "nowhere")


def test_the_flag_is_raised_by_the_file_and_says_so_once(tmp_path):
    lines, path = [], tmp_path / "stop"
    with InterruptFlag(announce=lines.append, stop_file=StopFile(path)) as flag:
        path.touch()
        assert flag.requested and flag.requested
    assert lines == [f"{path}: finishing what is being computed, then saving"]


@pytest.mark.parametrize(
    ("limit", "times", "expected"),
    [
        (None, [1e9, 2e9], [False, False]),
        ("00:00:00:00", [0.0], [True]),
        # An average step more would end at 60, 59.9, ...
        ("00:00:01:00", [30.0], [True]),
        ("00:00:01:00", [29.0, 39.0, 45.0], [False, False, True]),
        ("01:02:03:04", [86400.0 + 7384 - 1], [True]),
        ("01:02:03:04", [40_000.0], [False]),
    ],
)
def test_a_time_limit_leaves_room_for_an_average_step(limit, times, expected):
    clock = Clock()
    asked = TimeLimit(limit, clock)
    answers = []
    for clock.now in times:
        answers.append(asked.reached())
    assert answers == expected


@pytest.fixture(scope="module")
def whole(policy, tmp_path_factory) -> tiny_runs.Seen:
    folder = tmp_path_factory.mktemp("whole")
    seen = tiny_runs.run(tiny_runs.tiny_config(policy, folder))
    assert (seen.code, (folder / "finished").read_text()) == (0, "6\n")
    assert (folder / "plan.json").read_text() == '{"total_steps": 6}\n'
    return seen


def test_the_stop_file_saves_and_the_run_ends_bit_for_bit_the_same(
    policy, whole, tmp_path, monkeypatch, capfd
):
    run, stop = tmp_path / "run", tmp_path / "stop"
    config = tiny_runs.tiny_config(policy, run, "checkpointing.save_period=100")
    monkeypatch.setenv(VARIABLE, str(stop))
    # The file is looked at once a second; these runs take less.
    monkeypatch.setattr("igrpo_nemo.run.stop._PERIOD_S", 0.0)
    seen = tiny_runs.run(config, before_update=lambda n: stop.touch() if n == 3 else None)
    assert seen.code == 75 and not (run / "finished").exists()
    assert (run / "checkpoints" / "step_00000002").is_dir()
    assert len(tiny_runs.learned(run)) == 2
    assert f"{stop}: finishing what is being computed, then saving" in capfd.readouterr().err
    # Asked again before anything is done, it saves nothing new and stops.
    assert tiny_runs.run(config).code == 75
    stop.unlink()
    seen = tiny_runs.run(config)
    assert seen.code == 0 and (run / "finished").read_text() == "6\n"
    assert tiny_runs.same_weights(seen.final, whole.final)
    assert len(tiny_runs.learned(run)) == 6


def test_a_stop_in_the_warm_up_keeps_nothing_of_it(tmp_path, monkeypatch, capsys):
    stop, cache = tmp_path / "stop", tmp_path / "cache"
    stop.touch()
    monkeypatch.setenv(VARIABLE, str(stop))
    monkeypatch.setenv("IGRPO_CACHE_DIR", str(cache))
    words = ["experiment=demo", "igrpo.warmup.steps=50", f"logger.log_dir={tmp_path / 'run'}"]
    assert train(load_config([*words, "igrpo.warmup.batch_size=2"])) == 75
    assert "stopped in the warm-up, of which nothing is kept; run again" in capsys.readouterr().out
    assert not [path for path in (cache / "warmup").iterdir() if path.is_dir()]


def test_the_time_limit_saves_after_a_step(policy, whole, tmp_path):
    run = tmp_path / "run"
    keys = ["checkpointing.checkpoint_must_save_by=00:00:00:00", "grpo.max_num_steps=3"]
    config = tiny_runs.tiny_config(policy, run, "checkpointing.save_period=100", *keys)
    for step in (1, 2):
        assert tiny_runs.run(config).code == 75
        assert (run / "checkpoints" / f"step_{step:08d}").is_dir()
        assert not (run / "finished").exists()
    seen = tiny_runs.run(config)  # the last step ends the run, not its limit
    assert seen.code == 0 and (run / "finished").exists()
    assert tiny_runs.same_weights(seen.final, whole.weights[3])


def test_a_checkpoint_has_the_metrics_since_the_one_before(policy, tmp_path):
    """An older validation would pass an untested policy off as the best one."""
    keys = ("grpo.val_at_start=true", "grpo.max_num_steps=2", "checkpointing.keep_top_k=null")
    tiny_runs.run(tiny_runs.tiny_config(policy, tmp_path, *keys))
    validated = [
        "val/accuracy" in json.loads((folder / "metrics.json").read_text())
        for folder in sorted((tmp_path / "checkpoints").iterdir())
    ]
    assert validated == [True, False]


def test_a_finished_run_stays_finished_until_it_is_longer(policy, tmp_path):
    run = tmp_path / "run"
    longer = tiny_runs.tiny_config(policy, run, "grpo.max_num_steps=2")
    short = longer.replaced("grpo", max_num_steps=1)
    assert tiny_runs.run(short).code == 0
    assert tiny_runs.run(short).code == 0
    assert (run / "finished").read_text() == "1\n"

    def killed(step: int) -> None:
        assert not (run / "finished").exists(), "a job that comes now must train"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_runs.run(longer, before_update=killed)
    assert tiny_runs.run(longer).code == 0
    assert (run / "finished").read_text() == "2\n"


def _as_earlier_versions_wrote_it(run: Path, option: str) -> None:
    """Drafts made ahead in the checkpoint, no step of the last validation, the options' keys."""
    checkpoint = max((run / "checkpoints").iterdir())
    tensors = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    tensors["ahead"] = {"position": [0, 8], "problem_ids": ["p"], "texts": ["4"], "made_at": 2}
    torch.save(tensors, checkpoint / "optimizer.pt")
    state = json.loads((checkpoint / "state.json").read_text())
    state["extra"].pop("val_step", None)
    state["extra"]["earlier_seconds"] = 1000.0
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["igrpo"] |= {"draft_prefetch": option, "short_circuit": "off"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_a_run_of_an_earlier_version_goes_on_or_is_refused(policy, whole, tmp_path):
    run = tmp_path / "run"

    def killed(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    config = tiny_runs.tiny_config(policy, run)
    with pytest.raises(KeyboardInterrupt):
        tiny_runs.run(config, before_update=killed)
    _as_earlier_versions_wrote_it(run, "fused")
    with pytest.raises(UserError, match=r"igrpo\.draft_prefetch") as refused:
        tiny_runs.run(config)
    assert "\n" not in str(refused.value)
    _as_earlier_versions_wrote_it(run, "off")
    assert tiny_runs.same_weights(tiny_runs.run(config).final, whole.final)
    summary = json.loads((run / "summary.json").read_text())
    assert 1000 < summary["seconds"] < 1500, "the time of the earlier parts counts"


def test_a_resume_notices_another_base_model_and_edited_data(policy, tmp_path):
    base, run, data = tmp_path / "base", tmp_path / "run", tmp_path / "rows.jsonl"
    shutil.copytree(policy, base)
    rows = [{"problem": f"{i}+3*2=?", "answer": str(i)} for i in range(14)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = ["data.train.dataset_name=jsonl", f"data.train.data_path={data}"]
    cleared = ["data.train.lengths=null", "data.validation.lengths=[2]"]
    config = tiny_runs.tiny_config(base, run, *chosen, *cleared, "grpo.max_num_steps=1")
    assert tiny_runs.run(config).code == 0
    longer = config.replaced("grpo", max_num_steps=2)
    tiny_runs.tiny_policy(base, seed=2)
    with pytest.raises(UserError, match="another content of policy.model_name"):
        tiny_runs.run(longer)
    shutil.copytree(policy, base, dirs_exist_ok=True)
    data.write_text(data.read_text().replace('"answer": "3"', '"answer": "5"'))
    with pytest.raises(UserError, match="another content of data.train"):
        tiny_runs.run(longer)
    (run / "inputs.json").unlink()  # as an earlier version left the folder
    assert tiny_runs.run(longer).code == 0

"""The run folder: whole lines, whole files, one run at a time."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from igrpo_nemo.errors import UserError
from igrpo_nemo.run.folder import RunFolder


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_are_whole_strict_json_lines(tmp_path):
    with RunFolder(tmp_path / "a" / "run") as run:
        run.append_metrics("train", 1, 12.5, {"loss": torch.tensor(0.5), "bad": float("nan")})
        run.append_metrics("val", 1, 13.0, {"val/accuracy": 1})
        run.append_sample(1, {"draft": "line\u2028sep \ud800", "draft_reward": float("inf")})
        folder = run.path
        assert len((folder / "metrics.jsonl").read_bytes().splitlines()) == 2, "not flushed"
    first, second = records(folder / "metrics.jsonl")
    assert first == {
        "kind": "train",
        "step": 1,
        "time": 12.5,
        "metrics": {"loss": 0.5},
        "non_finite": {"bad": "nan"},
    }
    assert second == {"kind": "val", "step": 1, "time": 13.0, "metrics": {"val/accuracy": 1.0}}
    (sample,) = records(folder / "samples.jsonl")
    assert sample == {"step": 1, "draft": "line\u2028sep \ud800", "draft_reward": None}


def test_resuming_drops_later_records_and_torn_lines(tmp_path):
    with RunFolder(tmp_path) as run:
        for step in range(5):
            run.append_metrics("train", step, 0.0, {"loss": step})
            run.append_sample(step, {"question": "q"})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole + b'{"kind": "train", "step": 2, "met')
    with RunFolder(tmp_path) as run:
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole
        run.truncate_after(2)
        run.append_metrics("train", 3, 0.0, {"loss": 30})
        run.append_sample(3, {"question": "again"})
    assert [r["step"] for r in records(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    assert [r["step"] for r in records(tmp_path / "samples.jsonl")] == [0, 1, 2, 3]
    assert records(tmp_path / "metrics.jsonl")[-1]["metrics"] == {"loss": 30.0}
    with RunFolder(tmp_path) as run:
        run.truncate_after(-1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_torn_line_longer_than_the_reading_window_goes(tmp_path):
    (tmp_path / "samples.jsonl").write_bytes(b'{"step": 1}\n' + b"x" * 200_000)
    (tmp_path / "metrics.jsonl").write_bytes(b"y" * 70_000)
    RunFolder(tmp_path).close()
    assert (tmp_path / "samples.jsonl").read_bytes() == b'{"step": 1}\n'
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_broken_lines_in_the_middle_are_dropped_on_resume(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\0\0\0\n[1]\n{"step": "x"}\n')
    with RunFolder(tmp_path) as run:
        with pytest.warns(UserWarning, match="metrics.jsonl: 3 damaged lines are left out"):
            run.truncate_after(5)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'


def test_config_and_summary_are_written_whole_and_scrubbed(tmp_path):
    from omegaconf import OmegaConf

    config = {"a": {"b": 1, "c": "${a.b}"}, "hf_token": "hunter2", "text": "ü"}
    with RunFolder(tmp_path) as run:
        run.write_config(OmegaConf.create(config))
        run.write_summary(
            {"val_accuracy_end": torch.tensor(0.5), "x": float("inf"), "path": tmp_path}
        )
        run.write_summary({"val_accuracy_end": 0.75, "x": float("inf")})
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written == {"a": {"b": 1, "c": 1}, "hf_token": "<redacted>", "text": "ü"}
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "val_accuracy_end": 0.75,
        "x": None,
    }
    assert not list(tmp_path.glob(".*.writing"))


def test_a_forked_worker_does_not_hold_the_folder_of_its_dead_parent(tmp_path):
    run = RunFolder(tmp_path)
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        run.close()
        check = f"from igrpo_nemo.run.folder import RunFolder; RunFolder({str(tmp_path)!r}).close()"
        assert subprocess.run([sys.executable, "-c", check]).returncode == 0
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to logger.log_dir .*file"):
        RunFolder(tmp_path / "file")


def test_a_full_disk_undoes_the_line_and_names_the_file(tmp_path, monkeypatch):
    with RunFolder(tmp_path) as run:
        run.append_metrics("train", 1, 0.0, {"loss": 1})
        whole = (tmp_path / "metrics.jsonl").read_bytes()
        real, calls = os.write, []

        def half_then_full(descriptor, data):
            calls.append(len(data))
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
            return real(descriptor, data[: len(data) // 2])

        monkeypatch.setattr(os, "write", half_then_full)
        with pytest.raises(UserError, match="metrics.jsonl: no space left"):
            run.append_metrics("train", 2, 0.0, {"loss": 2})
        monkeypatch.undo()
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole
        run.append_metrics("train", 2, 0.0, {"loss": 2})
    assert [r["step"] for r in records(tmp_path / "metrics.jsonl")] == [1, 2]

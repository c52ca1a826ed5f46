"""Sinks: TensorBoard, wandb, MLflow, and what a failing one does."""

import importlib.util
import json
import re
import sys
import time
import warnings
from html import unescape

import pytest
from hostile_text import ROW

from igrpo_nemo.errors import UserError
from igrpo_nemo.run.folder import RunFolder
from igrpo_nemo.tracking import Tracker, open_tracker
from igrpo_nemo.tracking.services import TABLE_CHARACTERS, TABLE_ROWS, table_rows


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing import plugin_event_accumulator
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugin_util import markdown_to_safe_html

    def session(steps, value, resume_step=None):
        with RunFolder(tmp_path) as run, open_tracker(run, {}, {}, resume_step) as tracker:
            if resume_step is not None:
                run.truncate_after(resume_step)
            for step in steps:
                tracker.log("train", step, {"loss": value, "igrpo/lift": step})
                tracker.log_samples(step, [ROW])

    session(range(1, 6), 1.0)
    time.sleep(1.1)  # event files are ordered by the second in their name
    session(range(4, 7), 2.0, resume_step=3)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert shown == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    logged = records(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["metrics"]["loss"]) for r in logged] == shown
    assert all(abs(r["time"] - time.time()) < 60 for r in logged)
    assert [r["step"] for r in records(tmp_path / "samples.jsonl")] == [1, 2, 3, 4, 5, 6]
    shown = plugin_event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    tables = shown.Tensors("samples/text_summary")
    assert [event.step for event in tables] == [1, 2, 3, 4, 5, 6]
    html = markdown_to_safe_html(tables[0].tensor_proto.string_val[0])
    cells = [re.sub("<[^>]*>", "", cell) for cell in re.findall("<td>.*?</td>", html, re.S)]
    assert len(cells) == 1 + len(ROW) and cells[3] == "2", cells
    assert "[bold red]x[/]" in unescape(cells[2])


def test_a_table_is_bounded_and_without_secrets(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "long-hunter2-value")
    text = "the key long-hunter2-value \ud800 " + "x" * 5_000_000 + " answer"
    table = table_rows(7, [{"draft": text}, {"draft": None, "reward": 1.0}] * 9)
    assert len(table) == TABLE_ROWS and all(
        list(row) == ["step", "draft", "reward"] for row in table
    )
    shown = table[0]["draft"]
    assert len(shown) < 1.1 * TABLE_CHARACTERS and shown.endswith(" answer")
    assert "hunter2" not in shown and shown.isprintable()


class FailingSink:
    def __init__(self, remote):
        self.remote = remote
        self.calls = 0

    def log(self, kind, step, metrics):
        self.calls += 1
        raise ConnectionError("https://ann:hunter2@host refused")

    def log_samples(self, step, rows):
        pass

    def close(self):
        pass


def test_a_remote_failure_warns_and_is_given_up_and_a_local_one_ends_the_run():
    remote = FailingSink(remote=True)
    tracker = Tracker([remote])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(6):
            tracker.log("train", step, {})
    assert remote.calls == 3 == len(caught)
    assert "FailingSink failed" in str(caught[-1].message)
    assert "hunter2" not in "".join(str(entry.message) for entry in caught)
    with pytest.raises(ConnectionError):
        Tracker([FailingSink(remote=False)]).log("train", 1, {})


@pytest.mark.parametrize("extra", ["wandb", "mlflow"])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, extra):
    monkeypatch.setitem(sys.modules, extra, None)
    with RunFolder(tmp_path) as run:
        with pytest.raises(UserError, match=re.escape(f"pip install 'igrpo-nemo[{extra}]'")):
            open_tracker(run, {f"{extra}_enabled": True}, {})


def installed(name):
    return pytest.mark.skipif(
        importlib.util.find_spec(name) is None, reason=f"{name} (an extra) is not installed"
    )


@installed("wandb")
def test_wandb_offline_gets_metrics_samples_and_a_scrubbed_config(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = {"wandb_enabled": True, "wandb": {"project": "p", "name": "n"}}
    config = {"hf_token": "hunter2", "grpo": {"max_num_steps": 3}}
    ids = []
    for resume_step, step in ((None, 1), (1, 2)):
        with RunFolder(tmp_path) as run, open_tracker(run, logger, config, resume_step) as tracker:
            tracker.log("train", step, {"loss": 0.125})
            tracker.log_samples(step, [ROW])
        ids.append((tmp_path / "wandb_run_id").read_text())
    assert ids[0] == ids[1]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*.wandb"))
    assert b"max_num_steps" in written and b"loss" in written and b"hunter2" not in written
    tables = [json.loads(p.read_text()) for p in tmp_path.rglob("samples*.table.json")]
    assert sorted(table["data"][0][0] for table in tables) == [1, 2]
    assert tables[0]["columns"] == ["step", *ROW]
    assert tables[0]["data"][0][5:7] == [ROW["draft_reward"], ROW["draft_correct"]]


@installed("mlflow")
def test_mlflow_has_every_step_once_after_a_resume(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "store").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    settings = {"experiment_name": "e", "run_name": "r", "tracking_uri": uri}
    logger = {"mlflow_enabled": True, "mlflow": settings}
    config = {"hf_token": "hunter2", "grpo": {"max_num_steps": 3}}
    for resume_step, steps in ((None, (1, 2, 3)), (1, (2, 3, 4))):
        with RunFolder(tmp_path) as run, open_tracker(run, logger, config, resume_step) as tracker:
            for step in steps:
                tracker.log("train", step, {"igrpo/lift": step / 8})
            tracker.log_samples(steps[-1], [{"draft": "d"}])
    client = mlflow.MlflowClient(tracking_uri=uri)
    run_id = (tmp_path / "mlflow_run_id").read_text()
    history = client.get_metric_history(run_id, "igrpo/lift")
    assert [(metric.step, metric.value) for metric in history] == [
        (step, step / 8) for step in (1, 2, 3, 4)
    ]
    experiment = client.get_run(run_id).info.experiment_id
    table = client.load_table(experiment, "samples.json", [run_id])
    assert list(table["step"]) == [4] and list(table["draft"]) == ["d"]
    params = client.get_run(run_id).data.params
    assert params == {"hf_token": "<redacted>", "grpo.max_num_steps": "3"}

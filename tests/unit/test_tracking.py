"""Run folder, sinks, scrubbing and the console."""

import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from html import unescape

import pytest
import torch
import yaml

from igrpo_nemo.errors import UserError
from igrpo_nemo.files.display_text import printable, shorten
from igrpo_nemo.files.scrub import scrub
from igrpo_nemo.run.folder import RunFolder
from igrpo_nemo.tracking import Console, Tracker, open_tracker
from igrpo_nemo.tracking.services import TABLE_CHARACTERS, TABLE_ROWS, table_rows

NASTY = "[bold red]x[/] \x1b[31mred\x1b[0m \x1b]0;title\x07 a\rb\x08 \u202eevil \ud800 \x9b2J end"
ROW = {
    "problem_id": "p1",
    "question": f"1 + 1? {NASTY}",
    "answer": "2",
    "draft": f"{NASTY} three",
    "draft_reward": 0.0,
    "draft_correct": False,
    "refinement": f"{NASTY} two",
    "refinement_reward": 2.0,
    "refinement_correct": True,
}


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# The run folder


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


HOLDER = (
    "import sys, time; from igrpo_nemo.run.folder import RunFolder\n"
    "folder = RunFolder(sys.argv[1]); print('held', flush=True); time.sleep(60)"
)


def test_two_runs_never_share_a_folder(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"{tmp_path} is being written by pid {holder.pid} on"):
            RunFolder(tmp_path)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with RunFolder(tmp_path):  # a killed run leaves the folder free
        with pytest.raises(UserError, match="this process"):
            RunFolder(tmp_path)
    RunFolder(tmp_path).close()


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


# Secrets


@pytest.mark.parametrize(
    "key",
    "token hf_token HF_TOKEN hfToken wandb_api_key WANDB_API_KEY apiKey apikey key secret "
    "client_secret aws_secret_access_key password db_password passwd auth_token credentials "
    "access_token_v2 private_key token_value wandbkey".split(),
)
def test_secrets_are_replaced_at_any_depth(key):
    config = {"a": [{key: "hunter2"}], key: {"x": ["hunter2"]}}
    assert "hunter2" not in json.dumps(scrub(config))


def test_numbers_under_strong_names_are_secrets_too():
    assert scrub({"password": 1234, "api_key": None, "secret": True}) == {
        "password": "<redacted>",
        "api_key": None,
        "secret": True,
    }


def test_what_a_run_is_reproduced_from_stays():
    config = {
        "policy": {
            "tokenizer": {"name": "gpt2", "pad_token": "<pad>", "eos_token": "</s>"},
            "generation": {"max_new_tokens": 64, "stop_token_ids": [1, 2]},
            "train_mb_tokens": 2048,
            "moe_token_dispatcher_type": "alltoall",
        },
        "loss_fn": {"token_level_loss": True},
        "data": {"input_key": "problem", "output_key": "expected_answer", "text_key": "text"},
        "keep_top_k": 3,
        "system_prompt": "Think in <think> tokens.",
    }
    assert scrub(config) == config


def test_secrets_inside_values_are_replaced():
    config = {
        "tracking_uri": "https://ann:hunter2@mlflow.example/x",
        "note": "uses hf_abcdefghijklmnopqrstuvwx and sk-abcdefghijklmnop1234",
    }
    text = json.dumps(scrub(config))
    assert "hunter2" not in text and "abcdefghijkl" not in text
    assert "mlflow.example/x" in text and "uses" in text


# Sinks


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


# Text and the console


def test_model_text_cannot_command_a_terminal():
    shown = printable(NASTY)
    assert shown == "[bold red]x[/] red a b\ufffd \ufffdevil \ufffd end"
    assert printable("a\nb\t\u2028c") == "a b c"
    assert printable("\x1bP payload \x1b\\x\x1bc\x1b(B\x1b") == "x"


def test_shortening_keeps_the_end_and_is_bounded(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "igrpo_nemo.files.display_text.printable", lambda text: seen.append(text) or text
    )
    shown = shorten("start " + "x" * 5_000_000 + " the answer is 42", 60)
    assert len(seen[0]) < 1_000, "looks at far more than it shows"
    assert len(shown) <= 60 and shown.startswith("start") and shown.endswith("answer is 42")
    assert shorten("short", 60) == "short"


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


METRICS = {
    "igrpo/draft_reward": 0.5,
    "igrpo/refinement_reward": 1.25,
    "entropy/exact": 0.75,
    "perf/tokens_per_s": 1234.5,
}


def test_console_prints_one_line_per_step():
    clock, stream = Clock(), io.StringIO()
    console = Console(100, stream, clock)
    clock.now = 2.0
    console.stage("draft", 1, 8)
    console.step(1, METRICS)
    console.step(1, {"val/accuracy": 0.5, "val/reward": 1.0})
    console.step(2, {"igrpo/draft_reward": 0.5})
    lines = stream.getvalue().splitlines()
    assert lines[0] == (
        "step   1/100  draft reward 0.50  refinement reward 1.25  entropy 0.75  "
        "tokens/s 1,234  ETA 0:03:18"
    )
    assert lines[1] == "step   1/100  val accuracy 50.0%"
    assert lines[2].startswith("step   2/100  draft reward 0.50  ETA")
    clock.now = 40.0
    console.stage("refine", 3, 8)
    console.stage("refine", 4, 8)
    assert stream.getvalue().splitlines()[3:] == ["  refine 3/8"]


def test_console_shows_samples_as_inert_single_lines():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    console = Console(3, stream)
    console.samples(2, [ROW] * 9)
    console.note(f"saved {NASTY}")
    printed = stream.buffer.getvalue()
    assert printed.count(b"\n") == 3 * 3 + 1
    assert not any(byte < 32 and byte != 10 or byte > 126 for byte in printed)
    assert b"draft (reward 0.00, wrong): " in printed
    assert b"refinement (reward 2.00, correct): " in printed and b" two\n" in printed


def test_a_console_without_reader_does_not_end_the_run():
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(writer, "w")
    console = Console(3, stream)
    for step in range(3):
        console.step(step, METRICS)
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_importing_tracking_does_not_import_torch():
    check = (
        "import sys, igrpo_nemo.tracking; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'wandb', 'mlflow')))"
    )
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0

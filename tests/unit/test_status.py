"""`igrpo status`: facts from the folder and the queue, the right log, and no secrets."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from cases import cases
from fake_slurm import squeue_line

from igrpo_nemo.cli import main
from igrpo_nemo.cluster.job import job_name
from igrpo_nemo.cluster.status import log_tail, run_status
from igrpo_nemo.files.scrub import scrub_text
from igrpo_nemo.run.folder import RunFolder

CASES = cases(__file__)


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_run(path: Path, steps: int = 3, total: int = 10) -> Path:
    with RunFolder(path) as folder:
        folder.write_config({"checkpointing": {"checkpoint_dir": str(path / "checkpoints")}})
        folder.write_plan(total)
        folder.append_metrics("val", 0, time.time(), {"val/accuracy": 0.25})
        for step in range(1, steps + 1):
            metrics = {
                "igrpo/draft_reward": 1.0 + step / 100,
                "igrpo/refinement_reward": 1.5,
                "igrpo/trained_reward": 1.5,
                "igrpo/draft_truncated_rate": 0.0 if step % 2 else 0.9,
                "igrpo/zero_advantage_groups": 0.5,
                "perf/tokens_per_s": 1000.0 * step,
                "timing/step": 2.0 * step,
            }
            folder.append_metrics("train", step, time.time(), metrics)
        folder.append_metrics("val", steps, time.time(), {"val/accuracy": 0.5})
    return path


def status(capsys, *words: str) -> str:
    assert main(["status", *words]) == 0
    return capsys.readouterr().out


def test_a_run_without_slurm(no_slurm, capsys):
    run = make_run(Path("runs/a"))
    for name in ("step_2", "step_00000003", "tmp_step_4", "step_x"):
        (run / "checkpoints" / name).mkdir(parents=True)
    lines = [line.split(None, 1) for line in status(capsys, "runs/a").splitlines()]
    assert lines[0] == ["runs/a"]
    told = {line[0]: line[1] for line in lines[1:]}
    assert told["state"] == "stopped"
    assert told["step"] == "3/10, 4 s a step"
    assert told["reward"] == "draft 1.03, refinement 1.50"
    assert told["held-out"] == "50.0% at step 3, 25.0% at step 0"
    assert told["tokens/s"] == "3,000"
    shares = [line[1] for line in lines if line[0] == "share"]
    assert shares[0].startswith("30% drafts that met the token limit (high: raise policy.gen")
    assert shares[1:] == ["50% groups without advantage"]
    assert told["checkpoint"].startswith("step 3, 0:00:0")
    assert "starts" not in told and "log" not in told
    assert status(capsys, "a").splitlines()[0] == "runs/a"


def test_the_queue_makes_it_running_or_queued(slurm, capsys):
    run = make_run(Path("runs/a"))
    name = job_name(run)
    waiting = squeue_line(8, "PENDING", name, reason="Dependency", start="2030-01-01T00:00:00")
    running = squeue_line(7, "RUNNING", name, nodes="node[1-2]", left="3:00", elapsed="1:00")
    failed = squeue_line(6, "FAILED", name, elapsed="9:00")
    slurm.answers("squeue", squeue_line(5, "RUNNING", "igrpo-b-00000000") + waiting)
    text = status(capsys, "a")
    assert "  state        queued\n" in text
    assert "  job          8 PENDING (Dependency), starts about 2030-01-01T00:00:00\n" in text
    slurm.answers("squeue", running + waiting + failed)
    text = status(capsys, "a")
    assert "  state        running\n" in text and "ETA 0:00:28" in text
    assert "  job          6 FAILED after 9:00\n" in text
    assert "  job          7 RUNNING on node[1-2], 1:00 so far, 3:00 left\n" in text
    (run / "finished").write_text("10\n")
    assert "  state        finished\n" in status(capsys, "a")


def test_a_run_outside_of_slurm_is_seen_by_its_lock(no_slurm, capsys):
    run = make_run(Path("runs/a"))
    with RunFolder(run):
        assert f"  state        running: this process ({os.getpid()})\n" in status(capsys, "a")


@pytest.mark.parametrize(("errors", "told"), CASES["silent"])
def test_slurm_that_does_not_answer_is_a_warning(slurm, capsys, errors, told):
    make_run(Path("runs/a"))
    slurm.refuses("squeue", *errors)
    assert main(["status", "a"]) == 0
    captured = capsys.readouterr()
    assert "state" in captured.out
    assert captured.err == f"warning: the queue is not known: {told}\n"


def test_json_is_the_same_as_data(slurm, capsys):
    run = make_run(Path("runs/a"))
    (run / "slurm" / "7-1").mkdir(parents=True)
    (run / "slurm" / "7-1" / "driver.log").write_text("step 3\n")
    slurm.answers("squeue", squeue_line(7, "RUNNING"))
    values = json.loads(status(capsys, "a", "--json"))
    assert (values["state"], values["step"], values["total_steps"]) == ("running", 3, 10)
    assert values["eta_s"] == pytest.approx(28.0) and values["accuracy"] == 0.5
    assert (values["starts"], values["restarts"], values["jobs"][0]["id"]) == (1, 1, 7)
    assert values["log"]["lines"] == ["step 3"]
    assert values["shares"]["igrpo/draft_truncated_rate"] == pytest.approx(0.3)
    assert [v["folder"] for v in json.loads(status(capsys, "--json"))] == ["runs/a"]


def test_without_a_name_it_lists_the_runs(no_slurm, capsys):
    assert status(capsys) == "there are no runs under runs/: give a run folder\n"
    make_run(Path("runs/a"))
    make_run(Path("runs/arm/seed1"))
    (Path("runs/queued") / "slurm").mkdir(parents=True)
    Path("runs/notes").mkdir()
    header, *rows = status(capsys).splitlines()
    assert header.split() == ["run", "state", "step", "reward", "held-out", "last", "record"]
    assert [row.split()[:2] for row in rows] == [
        ["a", "stopped"], ["arm/seed1", "stopped"], ["queued", "not"],
    ]  # fmt: skip
    assert "3/10" in rows[0] and "0/?" in rows[2]


def test_a_name_that_is_no_run(no_slurm, capsys):
    assert main(["status", "nope"]) == 2
    assert "nope is no run folder, nor is runs/nope" in capsys.readouterr().err


# The log


def start(run: Path, name: str, **logs: str) -> None:
    folder = run / "slurm" / name
    folder.mkdir(parents=True)
    for log, text in logs.items():
        (folder / f"{log}.log").write_text(text)


def test_the_log_is_the_newest_starts(tmp_path):
    start(tmp_path, "9-0", driver="first\n", launcher="back to the queue\n")
    start(tmp_path, "10-0", driver="second\n")
    start(tmp_path, "9-10", driver="third\n")
    assert log_tail(tmp_path, 5, {}).path == tmp_path / "slurm" / "10-0" / "driver.log"
    start(tmp_path, "10-2", driver="", launcher="one\nerror: no workers\n")
    tail = log_tail(tmp_path, 1, {})
    assert (tail.path.name, tail.lines, tail.launcher) == (
        "launcher.log", ("error: no workers",), "error: no workers",
    )  # fmt: skip
    (tmp_path / "slurm" / "10.out").write_text("older\n")
    assert log_tail(tmp_path, 1, {}).path.name == "launcher.log"
    (tmp_path / "slurm" / "11.out").write_text("error: the preflight says no\n")
    tail = log_tail(tmp_path, 1, {})
    assert (tail.path.name, tail.lines) == ("11.out", ("error: the preflight says no",))


def test_without_a_start_there_is_no_log(tmp_path):
    assert log_tail(tmp_path, 5, {}) is None
    start(tmp_path, "9-0")
    assert log_tail(tmp_path, 5, {}) is None


def test_lines_are_safe_to_print(tmp_path):
    text = "\x1b[31mred\x1b[0m\n 10%\r 20%\r\n\n" + "x" * 500 + "\nlast without newline"
    start(tmp_path, "9-0", driver=text)
    red, drawn, long, last = log_tail(tmp_path, 9, {}).lines
    assert (red, drawn, last) == ("red", "20%", "last without newline")
    assert len(long) <= 200
    assert log_tail(tmp_path, 0, {}) is None


def test_a_huge_log_is_read_from_its_end(tmp_path):
    start(tmp_path, "9-0", driver="é" * 100_000 + "\nend\n")
    assert log_tail(tmp_path, 1, {}).lines == ("end",)


@pytest.mark.parametrize("text", CASES["secrets"])
def test_no_secret_is_shown(tmp_path, text):
    environ = {"JUDGE_API_KEY": "long-hunter2-value", "HOME": "/root"}
    start(tmp_path, "9-0", driver=f"{text}\n")
    (line,) = log_tail(tmp_path, 1, environ).lines
    assert "hunter2" not in line and "<redacted>" in line


@pytest.mark.parametrize("text", CASES["ordinary"])
def test_ordinary_lines_stay(text):
    environ = {"RAY_AUTH_TOKEN_PATH": "/tmp/token", "SHORT_TOKEN": "1"}
    assert scrub_text(text, environ) == text


# The metrics


def test_records_are_read_from_the_end(tmp_path, monkeypatch):
    assert run_status(tmp_path)["step"] == 0
    monkeypatch.setattr("igrpo_nemo.cluster.status._METRICS_BYTES", 1 << 14)
    path = make_run(tmp_path / "run", steps=400) / "metrics.jsonl"
    assert path.stat().st_size > 2 * (1 << 14)
    path.write_bytes(path.read_bytes() + b'\n[1]\n{"kind": "train"}\nnoise\n{"kind": "tra')
    found = run_status(tmp_path / "run")
    assert (found["step"], found["accuracy_step"], found["accuracy_start"]) == (400, 400, 0.25)
    assert found["seconds_per_step"] == pytest.approx(2.0 * (400 - 4.5))


def test_plain_grpo_has_one_reward(tmp_path, capsys, no_slurm):
    with RunFolder(tmp_path / "run") as folder:
        folder.append_metrics("train", 1, time.time(), {"igrpo/draft_reward": 0.5})
    assert run_status(tmp_path / "run")["reward"] == {"draft": 0.5}
    assert "  reward       0.50\n" in status(capsys, "run")


def test_checkpoints_elsewhere_are_found(tmp_path):
    run, other = tmp_path / "run", tmp_path / "fast disk"
    with RunFolder(run) as folder:
        folder.write_config({"checkpointing": {"checkpoint_dir": str(other)}})
    (other / "step_5").mkdir(parents=True)
    assert run_status(run)["checkpoint_step"] == 5


def test_a_checkpoint_that_is_removed_while_it_is_looked_at_does_not_count(tmp_path):
    checkpoints = make_run(tmp_path / "run") / "checkpoints"
    (checkpoints / "step_1").mkdir(parents=True)
    # Listed, and not there: as where it is removed after the listing.
    (checkpoints / "step_2").symlink_to("gone")
    assert run_status(tmp_path / "run")["checkpoint_step"] == 1

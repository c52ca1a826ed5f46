"""A run's state, read from its folder and from the queue. Nothing is written or locked.

RUN/metrics.jsonl                       read from its end: a long run's file is large
RUN/slurm/<job>-<restart>/driver.log    the training itself
                         /launcher.log  the job script: started, requeued, error
RUN/slurm/<job>.out                     a job that ended before it had a log folder
  -> run_status -> plain values -> text | JSON
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from igrpo_nemo.alarms import HEADLINES
from igrpo_nemo.cluster.client import Job
from igrpo_nemo.cluster.job import LOGS, jobs_of, log_folders
from igrpo_nemo.config.section import at
from igrpo_nemo.errors import UserError
from igrpo_nemo.files.display_text import clock, columns, shorten
from igrpo_nemo.files.scrub import scrub_text
from igrpo_nemo.run.folder import CONFIG, FINISHED, PLAN, stored_config
from igrpo_nemo.run.lock import writer_of

_STEPS = 10
"""Steps that the pace and the headline shares are averaged over."""
_METRICS_BYTES, _LOG_BYTES = 1 << 22, 1 << 16
"""How much of a file's end is read."""
_WIDTH = 200

REWARDS = {
    "draft": "igrpo/draft_reward",
    "refinement": "igrpo/refinement_reward",
    "trained": "igrpo/trained_reward",
}


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's: started, or submitted."""
    return any((folder / name).exists() for name in (CONFIG, "metrics.jsonl", LOGS))


def run_status(folder: Path, jobs: Sequence[Job] = ()) -> dict[str, Any]:
    """The state of the run in `folder`; `jobs` are all of the user's in the queue.

    Times are seconds, accuracies fractions; None is what nobody has written yet. `state` is one of
    finished, running, queued, stopped, not started; `starts` counts the logs of jobs and restarts;
    `writer` is a process outside of Slurm; `eta_s` extrapolates the newest steps.
    """
    mine = jobs_of(folder, jobs)
    newest = _newest_metrics(folder / "metrics.jsonl")
    writer, starts = writer_of(folder), list(log_folders(folder))
    total, pace = _planned_steps(folder), newest["seconds_per_step"]
    checkpoint = _newest_checkpoint(folder) or (None, None)
    left = None if total is None or pace is None else max(0, total - newest["step"]) * pace
    return {
        "folder": str(folder),
        "state": _state(folder, newest["updated"] is not None, mine, writer),
        **newest,
        "total_steps": total,
        "eta_s": left,
        "checkpoint_step": checkpoint[0],
        "checkpoint_time": checkpoint[1],
        "starts": len(starts),
        "restarts": sum(restart > 0 for _, restart in starts),
        "jobs": [{**asdict(job), "active": job.active} for job in mine],
        "writer": writer,
    }


def _state(folder: Path, logged: bool, jobs: Sequence[Job], writer: str | None) -> str:
    active = [job for job in jobs if job.active]
    if (folder / FINISHED).is_file():
        return "finished"
    if writer or any(job.state not in ("PENDING", "REQUEUED") for job in active):
        return "running"
    if active:
        return "queued"
    return "stopped" if logged else "not started"


def _planned_steps(folder: Path) -> int | None:
    try:
        total = yaml.safe_load((folder / PLAN).read_text(encoding="utf-8"))["total_steps"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None
    return total if isinstance(total, int) else None


def _newest_checkpoint(folder: Path) -> tuple[int, float] | None:
    """Step and time of the newest complete checkpoint of either engine."""
    configured = None
    with suppress(UserError):  # of a broken config, what else there is can be told
        configured = at(stored_config(folder), "checkpointing.checkpoint_dir")
    places = {folder / "checkpoints", Path(str(configured or folder))}
    found = []
    for entry in (entry for place in places if place.is_dir() for entry in place.iterdir()):
        if match := re.fullmatch(r"step_(\d+)", entry.name):
            with suppress(FileNotFoundError):  # the run removes old ones meanwhile
                found.append((int(match[1]), entry.stat().st_mtime))
    return max(found, default=None)


def _newest_metrics(path: Path) -> dict[str, Any]:
    """What the newest steps logged; a run that is still going may be writing meanwhile."""
    records = [*_records(_end_of(path, _METRICS_BYTES))][::-1]
    train = [record for record in records if record["kind"] == "train"][:_STEPS]
    validations = [record for record in records if "val/accuracy" in record["metrics"]]
    with suppress(OSError), path.open("rb") as file:  # step 0 stands at the file's beginning
        validations += _records(b"".join(file.readline() for _ in range(2)))
    accuracies = [(r["step"], r["metrics"].get("val/accuracy")) for r in validations]
    step, accuracy = accuracies[0] if accuracies else (None, None)
    newest = train[0]["metrics"] if train else {}
    names = ("timing/step", *(headline.metric for headline in HEADLINES))
    found = {n: [v for r in train if (v := r["metrics"].get(n)) is not None] for n in names}
    means = {name: sum(values) / len(values) for name, values in found.items() if values}
    return {
        "step": train[0]["step"] if train else 0,
        "updated": max((float(record["time"]) for record in records), default=None),
        "reward": {stage: newest[name] for stage, name in REWARDS.items() if name in newest},
        "tokens_per_s": newest.get("perf/tokens_per_s"),
        "seconds_per_step": means.pop("timing/step", None),
        "shares": means,
        "accuracy": accuracy,
        "accuracy_step": step,
        "accuracy_start": next((found for step, found in accuracies[::-1] if step == 0), None),
    }


def _records(text: bytes) -> Iterator[dict[str, Any]]:
    """The records among the lines; others, such as a torn one, are passed over."""
    for line in text.split(b"\n"):
        with suppress(ValueError, KeyError, TypeError):
            record = {"kind": "", **json.loads(line)}
            numbers = isinstance(record["step"], int) and isinstance(record["time"], int | float)
            if numbers and isinstance(record["metrics"], dict):
                yield record


def _end_of(path: Path, size: int) -> bytes:
    """At most `size` bytes from the end of a file; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - size))
            return file.read()
    except OSError:
        return b""


class LogTail(NamedTuple):
    """The last lines of a log; `launcher` is the job script's last word, None where it has none."""

    path: Path
    lines: tuple[str, ...]
    launcher: str | None = None


def log_tail(
    run_folder: Path, lines: int, environ: Mapping[str, str] = os.environ
) -> LogTail | None:
    """The end of the newest start's log, or None where no job has started."""
    starts = log_folders(run_folder)
    newest_job = max((job for job, _ in starts), default=-1)
    early = [int(p.stem) for p in (run_folder / LOGS).glob("*.out") if p.stem.isdecimal()]
    if (job := max(early, default=-1)) > newest_job:
        path = run_folder / LOGS / f"{job}.out"
        return LogTail(path, last_lines(path, lines, environ))
    if not starts:
        return None
    folder = starts[max(starts)]
    launcher = last_lines(folder / "launcher.log", 1, environ)
    for name in ("driver.log", "head.log", "launcher.log"):
        if found := last_lines(folder / name, lines, environ):
            return LogTail(folder / name, found, launcher[0] if launcher else None)
    return None


def last_lines(path: Path, count: int, environ: Mapping[str, str]) -> tuple[str, ...]:
    """The last lines that are not empty, safe to print; none where the file cannot be read."""
    text = scrub_text(_end_of(path, _LOG_BYTES).decode("utf-8", "replace"), environ)
    # A progress bar writes over its line: what counts is what was drawn last.
    drawn = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    shown = [line for line in (shorten(line, _WIDTH) for line in drawn) if line]
    return tuple(shown[-count:]) if count else ()


def block(status: Mapping[str, Any], log: LogTail | None) -> str:
    """Everything about one run, a fact a line, and the end of its log."""
    facts = list(_facts(status))
    if log is not None:
        facts += [("launcher", log.launcher)] if log.launcher is not None else []
        facts.append(("log", str(log.path)))
    width = max(len(name) for name, _ in facts)
    lines = [status["folder"], *(f"  {name:<{width}}  {told}" for name, told in facts)]
    return "\n".join([*lines, *(f"  | {line}" for line in (log.lines if log else ()))])


def table(statuses: Sequence[Mapping[str, Any]], root: Path) -> str:
    """A line a run: state, steps, reward, accuracy, how long ago it last wrote."""
    rows: list[tuple[str, ...]] = [("run", "state", "step", "reward", "held-out", "last record")]
    for status in statuses:
        folder, accuracy = Path(status["folder"]), status["accuracy"]
        name = folder.relative_to(root) if folder.is_relative_to(root) else folder
        known = (_rewards(status), "" if accuracy is None else f"{accuracy:.1%}")
        told = [cell or "-" for cell in (*known, _ago(status["updated"]))]
        rows.append((str(name), status["state"], _steps(status), *told))
    return "\n".join(columns(rows))


def _facts(status: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    running, pace, eta = status["state"] == "running", status["seconds_per_step"], status["eta_s"]
    yield "state", status["state"] + (f": {w}" if running and (w := status["writer"]) else "")
    for job in status["jobs"]:
        yield "job", _job(job)
    told = "" if pace is None else f", {pace:.3g} s a step"
    told += f", ETA {clock(eta)}" if running and eta is not None else ""
    yield "step", _steps(status) + told
    if told := _rewards(status):
        yield "reward", told
    for headline in HEADLINES:
        if (share := status["shares"].get(headline.metric)) is not None:
            remedy = f" (high: {headline.remedy})" if share > headline.threshold else ""
            yield "share", f"{share:.0%} {headline.name}{remedy}"
    if (accuracy := status["accuracy"]) is not None:
        first = status["accuracy_start"]
        start = "" if first is None else f", {first:.1%} at step 0"
        yield "held-out", f"{accuracy:.1%} at step {status['accuracy_step']}{start}"
    if (rate := status["tokens_per_s"]) is not None:
        yield "tokens/s", f"{rate:,.0f}"
    if ago := _ago(status["updated"]):
        yield "last record", ago
    if (step := status["checkpoint_step"]) is not None:
        yield "checkpoint", f"step {step}, {_ago(status['checkpoint_time'])}"
    if starts := status["starts"]:
        yield "starts", f"{starts}, {status['restarts']} of them restarts"


def _ago(moment: float | None) -> str:
    """How long ago a time of this clock was; empty where there is none."""
    return "" if moment is None else f"{clock(max(0.0, time.time() - moment))} ago"


def _job(job: Mapping[str, Any]) -> str:
    told = f"{job['id']} {job['state']}"
    if job["state"] == "PENDING":
        start = "" if job["start"] == "N/A" else f", starts about {job['start']}"
        return f"{told} ({job['reason']}){start}"
    if job["active"]:
        return f"{told} on {job['nodes']}, {job['elapsed']} so far, {job['left']} left"
    return f"{told} after {job['elapsed']}"


def _steps(status: Mapping[str, Any]) -> str:
    total = status["total_steps"]
    return f"{status['step']}/{'?' if total is None else total}"


def _rewards(status: Mapping[str, Any]) -> str:
    shown = status["reward"]
    if "refinement" in shown:
        stages = [stage for stage in ("draft", "refinement") if stage in shown]
        return ", ".join(f"{stage} {shown[stage]:.2f}" for stage in stages)
    values = [shown[stage] for stage in ("trained", "draft") if stage in shown]
    return f"{values[0]:.2f}" if values else ""

"""A run's state, read from its folder and from the queue, as data and as text for people.

Nothing is written or locked.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from igrpo_nemo.cluster.client import Job
from igrpo_nemo.cluster.job import jobs_of, log_folders
from igrpo_nemo.cluster.tails import LogTail, MetricsTail, read_mapping, read_metrics_tail
from igrpo_nemo.config.section import at
from igrpo_nemo.errors import UserError
from igrpo_nemo.run.folder import CONFIG, FINISHED, PLAN, stored_config
from igrpo_nemo.run.lock import writer_of

State = Literal["finished", "running", "queued", "stopped", "not started"]

_CHECKPOINT = re.compile(r"step_(\d+)")


@dataclass(frozen=True, slots=True)
class RunStatus:
    """One run. Times are seconds, accuracies fractions; None is what nobody has written yet.

    `tail` is what the newest steps logged; `eta_s` extrapolates them; `checkpoint` is step and time
    of the newest one; `starts` counts the logs of jobs and restarts; `writer` is a process outside
    of Slurm.
    """

    folder: Path
    state: State
    tail: MetricsTail
    total_steps: int | None
    checkpoint: tuple[int, float] | None
    starts: int
    restarts: int
    jobs: tuple[Job, ...]
    writer: str | None

    @property
    def eta_s(self) -> float | None:
        pace = self.tail.seconds_per_step
        if self.total_steps is None or pace is None:
            return None
        return max(0, self.total_steps - self.tail.step) * pace

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        values = asdict(self)
        tail, checkpoint = values.pop("tail"), values.pop("checkpoint") or (None, None)
        updated = tail.pop("time")
        return {
            **values,
            **tail,
            "folder": str(self.folder),
            "updated": updated,
            "eta_s": self.eta_s,
            "checkpoint_step": checkpoint[0],
            "checkpoint_time": checkpoint[1],
        }


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's: started, or submitted."""
    return any((folder / name).exists() for name in (CONFIG, "metrics.jsonl", "slurm"))


def run_status(folder: Path, jobs: Sequence[Job] = ()) -> RunStatus:
    """The state of the run in `folder`; `jobs` are all of the user's in the queue."""
    mine = tuple(jobs_of(folder, jobs))
    tail = read_metrics_tail(folder / "metrics.jsonl")
    total = read_mapping(folder / PLAN).get("total_steps")
    writer = writer_of(folder)
    starts = list(log_folders(folder))
    return RunStatus(
        folder=folder,
        state=_state(folder, tail, mine, writer),
        tail=tail,
        total_steps=total if isinstance(total, int) else None,
        checkpoint=_newest_checkpoint(folder),
        starts=len(starts),
        restarts=sum(restart > 0 for _, restart in starts),
        jobs=mine,
        writer=writer,
    )


def _state(folder: Path, tail: MetricsTail, jobs: Sequence[Job], writer: str | None) -> State:
    active = [job for job in jobs if job.active]
    if (folder / FINISHED).is_file():
        return "finished"
    if writer or any(job.state not in ("PENDING", "REQUEUED") for job in active):
        return "running"
    if active:
        return "queued"
    return "stopped" if tail.time is not None else "not started"


def _newest_checkpoint(folder: Path) -> tuple[int, float] | None:
    """Step and time of the newest complete checkpoint of either engine."""
    configured = None
    with suppress(UserError):  # of a broken config, what else there is can be told
        configured = at(stored_config(folder), "checkpointing.checkpoint_dir")
    places = {folder / "checkpoints", Path(str(configured or folder))}
    found = []
    for entry in (entry for place in places if place.is_dir() for entry in place.iterdir()):
        if match := _CHECKPOINT.fullmatch(entry.name):
            with suppress(FileNotFoundError):  # the run removes old ones meanwhile
                found.append((int(match[1]), entry.stat().st_mtime))
    return max(found, default=None)


def block(status: RunStatus, log: LogTail | None) -> str:
    """Everything about one run, a fact a line, and the end of its log."""
    facts = list(_facts(status, log))
    width = max(len(name) for name, _ in facts)
    lines = [str(status.folder), *(f"  {name:<{width}}  {told}" for name, told in facts)]
    if log is not None:
        lines += [f"  | {line}" for line in log.lines]
    return "\n".join(lines)


def table(statuses: Sequence[RunStatus], root: Path) -> str:
    """A line a run: state, steps, reward, accuracy, how long ago it last wrote."""
    header = ("run", "state", "step", "reward", "held-out", "last record")
    rows = [header, *(_row(status, root) for status in statuses)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _ago(moment: float | None) -> str:
    """How long ago a time of this clock was; empty where there is none."""
    return "" if moment is None else f"{clock(max(0.0, time.time() - moment))} ago"


def clock(seconds: float) -> str:
    """`h:mm:ss`."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _row(status: RunStatus, root: Path) -> tuple[str, ...]:
    folder = status.folder
    name = str(folder.relative_to(root)) if folder.is_relative_to(root) else str(folder)
    return (
        name,
        status.state,
        _steps(status),
        _rewards(status) or "-",
        "-" if status.tail.accuracy is None else f"{status.tail.accuracy:.1%}",
        _ago(status.tail.time) or "-",
    )


def _facts(status: RunStatus, log: LogTail | None) -> Iterator[tuple[str, str]]:
    running, tail = status.state == "running", status.tail
    yield "state", status.state + (f": {status.writer}" if running and status.writer else "")
    for job in status.jobs:
        yield "job", _job(job)
    yield "step", _steps(status) + _pace(status)
    if told := _rewards(status):
        yield "reward", told
    if tail.accuracy is not None:
        start = "" if tail.accuracy_start is None else f", {tail.accuracy_start:.1%} at step 0"
        yield "held-out", f"{tail.accuracy:.1%} at step {tail.accuracy_step}{start}"
    if tail.tokens_per_s is not None:
        yield "tokens/s", f"{tail.tokens_per_s:,.0f}"
    if ago := _ago(tail.time):
        yield "last record", ago
    if status.checkpoint is not None:
        step, moment = status.checkpoint
        yield "checkpoint", f"step {step}, {_ago(moment)}"
    if status.starts:
        yield "starts", f"{status.starts}, {status.restarts} of them restarts"
    if log is not None:
        if log.launcher is not None:
            yield "launcher", log.launcher
        yield "log", str(log.path)


def _job(job: Job) -> str:
    told = f"{job.id} {job.state}"
    if job.state == "PENDING":
        start = "" if job.start == "N/A" else f", starts about {job.start}"
        return f"{told} ({job.reason}){start}"
    if job.active:
        return f"{told} on {job.nodes}, {job.elapsed} so far, {job.left} left"
    return f"{told} after {job.elapsed}"


def _steps(status: RunStatus) -> str:
    return f"{status.tail.step}/{'?' if status.total_steps is None else status.total_steps}"


def _pace(status: RunStatus) -> str:
    if status.tail.seconds_per_step is None:
        return ""
    told = f", {status.tail.seconds_per_step:.3g} s a step"
    if status.state != "running" or status.eta_s is None:
        return told
    return f"{told}, ETA {clock(status.eta_s)}"


def _rewards(status: RunStatus) -> str:
    shown = status.tail.reward
    if "refinement" in shown:
        shown = {stage: shown[stage] for stage in ("draft", "refinement") if stage in shown}
        return ", ".join(f"{stage} {value:.2f}" for stage, value in shown.items())
    values = [shown[stage] for stage in ("trained", "draft") if stage in shown]
    return f"{values[0]:.2f}" if values else ""

"""A run's status for people: a block for one run, a line each for several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from igrpo_nemo.cluster.client import Job
from igrpo_nemo.cluster.log_tail import LogTail
from igrpo_nemo.cluster.status import RunStatus, seconds_since


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


def clock(seconds: float) -> str:
    """`h:mm:ss`."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _row(status: RunStatus, root: Path) -> tuple[str, ...]:
    folder = status.folder
    name = str(folder.relative_to(root)) if folder.is_relative_to(root) else str(folder)
    ago = seconds_since(status.updated)
    return (
        name,
        status.state,
        _steps(status),
        _rewards(status) or "-",
        "-" if status.accuracy is None else f"{status.accuracy:.1%}",
        "-" if ago is None else f"{clock(ago)} ago",
    )


def _facts(status: RunStatus, log: LogTail | None) -> Iterator[tuple[str, str]]:
    running = status.state == "running"
    yield "state", status.state + (f": {status.writer}" if running and status.writer else "")
    for job in status.jobs:
        yield "job", _job(job)
    yield "step", _steps(status) + _pace(status)
    if told := _rewards(status):
        yield "reward", told
    if status.accuracy is not None:
        start = "" if status.accuracy_start is None else f", {status.accuracy_start:.1%} at step 0"
        yield "held-out", f"{status.accuracy:.1%} at step {status.accuracy_step}{start}"
    if status.tokens_per_s is not None:
        yield "tokens/s", f"{status.tokens_per_s:,.0f}"
    if (ago := seconds_since(status.updated)) is not None:
        yield "last record", f"{clock(ago)} ago"
    if status.checkpoint_step is not None:
        ago = seconds_since(status.checkpoint_time) or 0.0
        yield "checkpoint", f"step {status.checkpoint_step}, {clock(ago)} ago"
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
    return f"{status.step}/{'?' if status.total_steps is None else status.total_steps}"


def _pace(status: RunStatus) -> str:
    if status.seconds_per_step is None:
        return ""
    told = f", {status.seconds_per_step:.3g} s a step"
    if status.state != "running" or status.eta_s is None:
        return told
    return f"{told}, ETA {clock(status.eta_s)}"


def _rewards(status: RunStatus) -> str:
    shown = status.reward
    if "refinement" in shown:
        shown = {stage: shown[stage] for stage in ("draft", "refinement") if stage in shown}
        return ", ".join(f"{stage} {value:.2f}" for stage, value in shown.items())
    values = [shown[stage] for stage in ("trained", "draft") if stage in shown]
    return f"{values[0]:.2f}" if values else ""

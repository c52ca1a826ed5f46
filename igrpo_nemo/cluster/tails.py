"""The ends of what a run writes: its newest metrics, and the log that says what it does.

RUN/metrics.jsonl                       read from its end: a long run's file is large
RUN/slurm/<job>-<restart>/driver.log    the training itself
                         /launcher.log  the job script: started, requeued, error
RUN/slurm/<job>.out                     a job that ended before it had a log folder
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from igrpo_nemo.cluster.job import LOGS, log_folders
from igrpo_nemo.files.display_text import shorten
from igrpo_nemo.files.scrub import scrub_text

_STEPS = 10
"""Steps that the pace is averaged over."""
_BLOCK = 1 << 18

REWARDS = {
    "draft": "igrpo/draft_reward",
    "refinement": "igrpo/refinement_reward",
    "trained": "igrpo/trained_reward",
}


@dataclass(frozen=True, slots=True)
class MetricsTail:
    """What the newest steps logged; None for what did not come up yet."""

    step: int = 0
    time: float | None = None
    reward: Mapping[str, float] = field(default_factory=dict)
    tokens_per_s: float | None = None
    seconds_per_step: float | None = None
    accuracy: float | None = None
    accuracy_step: int | None = None
    accuracy_start: float | None = None


def read_metrics_tail(path: Path) -> MetricsTail:
    """Reads what a run that is still going has written; lines that are no records are passed over.

    A file that is missing gives an empty tail.
    """
    train: list[dict[str, Any]] = []
    val: dict[str, Any] | None = None
    for record in _records(_lines_backwards(path)):
        if record["kind"] == "train" and len(train) < _STEPS:
            train.append(record)
        if record["kind"] == "val" and val is None and "val/accuracy" in record["metrics"]:
            val = record
        if len(train) == _STEPS and val is not None:
            break
    newest = train[0]["metrics"] if train else {}
    seconds = [s for r in train if (s := r["metrics"].get("timing/step")) is not None]
    times = [float(r["time"]) for r in (*train[:1], val) if r is not None]
    return MetricsTail(
        step=train[0]["step"] if train else 0,
        time=max(times, default=None),
        reward={stage: newest[name] for stage, name in REWARDS.items() if name in newest},
        tokens_per_s=newest.get("perf/tokens_per_s"),
        seconds_per_step=sum(seconds) / len(seconds) if seconds else None,
        accuracy=val["metrics"]["val/accuracy"] if val else None,
        accuracy_step=val["step"] if val else None,
        accuracy_start=_first_accuracy(path),
    )


def read_mapping(path: Path) -> dict[str, Any]:
    """A small YAML or JSON file of a run; empty where it is missing or torn."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _first_accuracy(path: Path) -> float | None:
    """The accuracy before the first step, which stands at the file's beginning."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        for record in _records(file.readline() for _ in range(2)):
            if record["kind"] == "val" and record["step"] == 0:
                return record["metrics"].get("val/accuracy")
    return None


def _records(lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict) or not isinstance(record.get("metrics"), dict):
            continue
        if isinstance(record.get("step"), int) and isinstance(record.get("time"), int | float):
            yield {"kind": "", **record}


def _lines_backwards(path: Path) -> Iterator[bytes]:
    """The lines of a file, the last one first."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        end, rest = file.seek(0, 2), b""
        while end > 0:
            start = max(0, end - _BLOCK)
            file.seek(start)
            first, *others = (file.read(end - start) + rest).split(b"\n")
            yield from reversed(others)
            end, rest = start, first
        yield rest


_BYTES = 1 << 16
_WIDTH = 200


@dataclass(frozen=True, slots=True)
class LogTail:
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
    early = {
        int(match[1]): path
        for path in (run_folder / LOGS).glob("*.out")
        if (match := re.fullmatch(r"(\d+)\.out", path.name)) and int(match[1]) > newest_job
    }
    if early:
        path = early[max(early)]
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
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ()
    # A progress bar writes over its line: what counts is what was drawn last.
    drawn = (
        line.rstrip("\r").rpartition("\r")[2] for line in scrub_text(text, environ).split("\n")
    )
    shown = [line for line in (shorten(line, _WIDTH) for line in drawn) if line]
    return tuple(shown[-count:]) if count else ()

"""The end of the log that says what a run does, or why it ended; without secrets.

RUN/slurm/<job>-<restart>/driver.log    the training itself
                         /launcher.log  the job script: started, requeued, error
RUN/slurm/<job>.out                     a job that ended before it had a log folder
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from igrpo_nemo.cluster.run_jobs import LOGS, log_folders
from igrpo_nemo.files.display_text import shorten
from igrpo_nemo.files.scrub import scrub_text

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

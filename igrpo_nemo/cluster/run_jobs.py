"""The jobs of a run: the name that they share, and the logs that they leave in its folder.

RUN/slurm/<job id>.out                  what the job script prints
RUN/slurm/<job id>-<restart>/           one start: driver.log, launcher.log, head.log, ...
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from igrpo_nemo.cluster.client import Job

LOGS = "slurm"

_START = re.compile(r"(\d+)-(\d+)")


def job_name(run_folder: Path) -> str:
    """The name that all jobs of a run share, and no other run's: `--dependency=singleton` lets
    one of a name run at a time."""
    path = str(run_folder.resolve())
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).name).strip("-")[:40]
    return f"igrpo-{base}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def log_folders(run_folder: Path) -> dict[tuple[int, int], Path]:
    """The logs of each start, by (job id, restart), in their order."""
    folder = run_folder / LOGS
    entries = list(folder.iterdir()) if folder.is_dir() else []
    found = {
        (int(match[1]), int(match[2])): entry
        for entry in entries
        if (match := _START.fullmatch(entry.name))
    }
    return dict(sorted(found.items()))


def jobs_of(run_folder: Path, jobs: Sequence[Job]) -> list[Job]:
    """The jobs of a run, oldest first: those of its name, and those that have logged in its folder,
    since a script that was submitted by hand has a name of its own."""
    name, logged = job_name(run_folder), {job for job, _ in log_folders(run_folder)}
    return sorted(
        (job for job in jobs if job.name == name or job.id in logged), key=lambda job: job.id
    )

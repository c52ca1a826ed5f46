"""The note of the jobs that were sent for an evaluation's folder, and whether they still write.

write_note, before the first job is sent and after the last --> OUT/submitted.json
check_not_running, before anything is written into OUT --> nothing, or a `UserError`
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from igrpo_nemo.cluster.client import has_slurm, my_jobs
from igrpo_nemo.errors import UserError
from igrpo_nemo.files.atomic import write_atomic

SUBMITTED_FILE = "submitted.json"

NEVER = "DependencyNeverSatisfied"
"""Slurm's reason for a job that waits for the success of one that failed: it will not start."""


def write_note(out: Path, expname: str, benchmarks: Sequence[str], jobs: Sequence[int]) -> None:
    """Notes what is sent: the name that all of its jobs have, and the numbers that are known."""
    note = {
        "expname": expname,
        "time": time.time(),
        "benchmarks": list(benchmarks),
        "jobs": list(jobs),
    }
    write_atomic(out / SUBMITTED_FILE, json.dumps(note).encode())


def check_not_running(out: Path) -> None:
    """Raises `UserError` while jobs that were sent for this folder may still write into it."""
    path = out / SUBMITTED_FILE
    try:
        expname = json.loads(path.read_text(encoding="utf-8"))["expname"]
    except (FileNotFoundError, ValueError):
        return
    if not has_slurm():
        raise UserError(
            f"{out} waits for jobs {expname} of a cluster that this machine cannot ask: "
            f"once they have ended, give --again or remove {path}"
        )
    named = [job for job in my_jobs() if job.active and expname in job.name]
    if running := [job for job in named if job.reason != NEVER]:
        raise UserError(
            f"{len(running)} jobs {expname} are queued or running for {out}: wait until they end"
        )

"""What `igrpo launch` says: what it would submit, or what it has submitted and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from igrpo_nemo.cluster.job import Submission, sbatch_command
from igrpo_nemo.cluster.run_jobs import LOGS


def dry_run_text(job: Submission, length: int, checks: str, checkout: Path) -> str:
    """The checks as comments, the commands as a shell could run them, and the script's own text."""
    lines = [f"# {line}".rstrip() for line in checks.splitlines()]
    lines += [f"# run folder: {job.run_folder}", f"cd {shlex.quote(str(checkout))}"]
    for number in range(1, length + 1):
        command = sbatch_command(job, f"JOB{number - 1}" if number > 1 else None)
        text = shlex.join(command).replace("=afterok:JOB", "=afterok:$JOB", 1)
        lines.append(f"JOB{number}=$({text})" if length > 1 else text)
    script = (checkout / job.script).read_text(encoding="utf-8")
    return "\n".join([*lines, "", f"# {job.script}", script])


def submitted_text(job: Submission, numbers: Sequence[int]) -> str:
    """The job ids, the run folder, and the commands that one wants next."""
    first, ids = numbers[0], " ".join(map(str, numbers))
    folder = shlex.quote(str(job.run_folder))
    lines = [f"submitted job{'s' if len(numbers) > 1 else ''} {ids} ({job.name})"]
    if job.shape is not None:
        lines += [f"run folder: {job.run_folder}", f"  igrpo status {folder}"]
    return "\n".join([*lines, f"  tail -F {folder}/{LOGS}/{first}.out", f"  scancel {ids}"])

"""Submitting: never two jobs of a run at once, and a chain in which each job awaits the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from igrpo_nemo.cluster.client import Job, my_jobs, submit
from igrpo_nemo.cluster.job import Submission, sbatch_command, sbatch_environment
from igrpo_nemo.cluster.run_jobs import LOGS, jobs_of
from igrpo_nemo.errors import UserError


def queued_jobs(job: Submission, *, in_chain: bool) -> list[Job]:
    """The run's jobs that run or wait, oldest first.

    Raises `UserError` where there are some and the new one is not to queue up behind them.
    """
    queued = [each for each in jobs_of(job.run_folder, my_jobs()) if each.active]
    if queued and not in_chain:
        told = ", ".join(f"{each.id} ({each.state})" for each in queued)
        raise UserError(
            f"{job.run_folder} has a job already: {told}; scancel it first, add jobs behind it "
            "with --chain K, or give this run another logger.log_dir"
        )
    return queued


def submit_chain(
    job: Submission, length: int, queued: Sequence[Job], checkout: Path, environ: Mapping[str, str]
) -> list[int]:
    """Submits `length` jobs, each behind the one before, the first behind what is queued.

    `queued` are the run's active jobs: there may be some for a chain alone. Returns the job ids.
    Raises `UserError` where Slurm refuses one; what was submitted before it stays in the queue.
    """
    logs = job.run_folder / LOGS
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {logs}, where the job logs: {error.strerror}") from error
    after = queued[-1].id if queued else None
    numbers: list[int] = []
    for _ in range(length):
        try:
            number = submit(sbatch_command(job, after), checkout, sbatch_environment(environ))
        except UserError as error:
            if not numbers:
                raise
            ids = " ".join(map(str, numbers))
            raise UserError(
                f"{error}; submitted before that: {ids} (scancel {ids} takes them back)"
            ) from error
        numbers.append(number)
        after = number
    return numbers

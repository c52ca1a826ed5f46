"""Submitting: never two jobs of a run at once, a finished run only if it is to be longer, and a
chain in which each job awaits the last.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from igrpo_nemo.cluster.client import Job, my_jobs, submit
from igrpo_nemo.cluster.job import LOGS, Submission, jobs_of, sbatch_command, sbatch_environment
from igrpo_nemo.config import Config
from igrpo_nemo.errors import UserError
from igrpo_nemo.run.folder import FINISHED


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


_LENGTH = ("max_num_steps", "max_num_epochs")


def is_finished(run_folder: Path, config: Config) -> bool:
    """Whether the last step of this config is done already."""
    return (run_folder / FINISHED).is_file() and not _is_longer(run_folder, config)


def reopen_if_longer(run_folder: Path, config: Config) -> bool:
    """Removes the marker of a finished run that is to go on; says whether it did. The job script
    looks at the marker before anything else."""
    marker = run_folder / FINISHED
    if not marker.is_file() or not _is_longer(run_folder, config):
        return False
    marker.unlink(missing_ok=True)
    return True


def _is_longer(run_folder: Path, config: Config) -> bool:
    path = run_folder / "config.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    before = values.get("grpo", {}) if isinstance(values, dict) else {}
    return any(
        isinstance(before.get(key), int) and getattr(config.grpo, key) > before[key]
        for key in _LENGTH
    )


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

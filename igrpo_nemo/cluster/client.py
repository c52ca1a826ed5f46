"""Slurm's client commands: what stands in the queue, and submitting a script.

    squeue -> Job, one per line          sbatch -> job id          scontrol -> a job's comment

Only the run lock asks Slurm too (run.lock). Slurm's own complaints become one-line `UserError`s.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from igrpo_nemo.errors import UserError
from igrpo_nemo.run.lock import ENDED, without_filters

_SECONDS = 30.0
_FIELDS = "%A|%T|%r|%M|%L|%S|%N|%j"


@dataclass(frozen=True, slots=True)
class Job:
    """A line of squeue; times as Slurm writes them (D-HH:MM:SS), `start` may be N/A."""

    id: int
    state: str
    reason: str
    elapsed: str
    left: str
    start: str
    nodes: str
    name: str

    @property
    def active(self) -> bool:
        """Whether it runs, or waits to."""
        return self.state not in ENDED


def has_slurm() -> bool:
    return shutil.which("squeue") is not None


def my_jobs() -> list[Job]:
    """This user's jobs, those included that ended so recently that Slurm still lists them.

    Raises `UserError` where squeue is missing or its controller does not answer.
    """
    words = ["--noheader", "--states=all", f"--user={os.getuid()}", f"--format={_FIELDS}"]
    rows = [line.split("|", 7) for line in _run("squeue", words).splitlines()]
    return [Job(int(number), *fields) for number, *fields in rows if len(fields) == 7]


def submit(command: Sequence[str], folder: Path, environ: Mapping[str, str]) -> int:
    """Runs an sbatch command line (with --parsable) in `folder`; the number of the job.

    Raises `UserError` with Slurm's reason.
    """
    text = _run(command[0], command[1:], folder, environ)
    number = text.strip().splitlines()[-1].partition(";")[0] if text.strip() else ""
    if not number.isdecimal():
        raise UserError(f"sbatch answered {text.strip()!r} instead of a job id")
    return int(number)


@contextmanager
def naming_submitted(jobs: Callable[[], Sequence[int]]) -> Iterator[None]:
    """What fails inside is told with the jobs that were submitted before, and how to take them
    back."""
    try:
        yield
    except UserError as error:
        if not (ids := " ".join(map(str, jobs()))):
            raise
        told = f"submitted before that: {ids} (scancel {ids} takes them back)"
        raise UserError(f"{error}; {told}") from error


def _run(
    program: str,
    words: Sequence[str],
    folder: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> str:
    try:
        done = subprocess.run(
            [program, *words],
            cwd=folder,
            env=without_filters(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
        )
    except FileNotFoundError:
        raise UserError(
            f"there is no {program} here: submit from a login node of a Slurm cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{program} did not answer within {_SECONDS:.0f} s") from None
    if "resolve_ctls_from_dns_srv" in done.stderr:
        raise UserError(
            f"{program} finds no Slurm here: use a login node of a cluster, or set SLURM_CONF to "
            "its slurm.conf"
        )
    if done.returncode:
        raise UserError(f"{program} says: {_reason(done.stderr) or f'exit {done.returncode}'}")
    return done.stdout


def _reason(errors: str) -> str:
    """Slurm's lines without their prefix, the last ones where there are many."""
    lines = [line.partition(": error: ")[2] or line.strip() for line in errors.splitlines()]
    return "; ".join(line for line in lines if line)[-300:]

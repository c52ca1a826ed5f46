"""One writer at a time in a run folder, on one machine or on several that share a disk.

    .lock       a process: a POSIX lock on the file, whose text says `pid P on HOST`, and under
                Slurm `, Slurm job J, restart R`
    slurm/job   a training job, from its start to its end or requeue: the file itself, with J as
                its text (slurm/lib/run_lock.sh, which needs neither Python nor the container)

A job takes the second, and its process the first beside it. One rule ends both without their
holder's doing: Slurm says that job J has no node (any more), and gives no answer otherwise.
A process that ends gives its lock back. A node that dies may not: some servers then keep its lock
for ever, and the file is replaced. (The package filelock knows neither holders nor Slurm.)
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import struct
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from igrpo_nemo.errors import UserError

NAME = ".lock"

ENDED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED"
    " SPECIAL_EXIT TIMEOUT".split()
)
"""States of a job that holds no node and will not get one by itself (squeue(1))."""
WITHOUT_NODES = ENDED | {"PENDING", "REQUEUED", "REQUEUE_HOLD"}
"""States in which a job's nodes of before are not its any more."""

_HOLDER = re.compile(r"pid (\d+) on (\S+)(?:, Slurm job (\d+), restart (\d+))?")
_TAKEN = {errno.EACCES, errno.EAGAIN}
_UNKNOWN_HERE = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}
_TRIES = 5

# POSIX locks do not exclude a second opening by the same process: this set does.
_held_here: set[Path] = set()


class RunLock:
    """Held from the construction to `release()`.

    A POSIX lock and not flock: it is not inherited by forked reward workers, which may outlive a
    killed trainer for a moment, and it works on NFS. Raises `UserError` naming the holder, and
    `OSError` where the folder cannot be written.
    """

    def __init__(self, folder: Path, environ: Mapping[str, str] = os.environ) -> None:
        self._folder = folder
        self._here = folder.resolve()
        self._path = folder / NAME
        self._environ = environ
        if self._here in _held_here:
            raise UserError(self._busy(f"this process ({os.getpid()})"))
        self._descriptor = self._acquire()
        _held_here.add(self._here)

    def release(self) -> None:
        """Lets the next writer in. Harmless when repeated."""
        if self._descriptor is not None:
            os.close(self._descriptor)  # which gives the lock back
            self._descriptor = None
        _held_here.discard(self._here)

    def _acquire(self) -> int | None:
        """The descriptor that holds the lock; None, with a warning, where there are no locks."""
        holder = ""
        for _ in range(_TRIES):
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = _text(descriptor)
                os.close(descriptor)
                if error.errno in _UNKNOWN_HERE:
                    warnings.warn(
                        f"{self._here} has no file locks: do not start two runs there", stacklevel=5
                    )
                    return None
                if error.errno not in _TAKEN:
                    raise
                if not self._is_gone(holder):
                    raise UserError(self._busy(holder)) from error
                self._replace(holder)
                continue
            if _is_file(descriptor, self._path):
                return self._signed(descriptor)
            os.close(descriptor)  # replaced by another process while it was being opened
        raise UserError(self._busy(holder))

    def _signed(self, descriptor: int) -> int:
        name, (job, restart) = f"pid {os.getpid()} on {socket.gethostname()}", self._slurm_job()
        if job is not None:
            name += f", Slurm job {job}, restart {restart}"
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{name}\n".encode(), 0)
        except OSError:  # a full disk
            os.close(descriptor)
            raise
        return descriptor

    def _slurm_job(self) -> tuple[int | None, int]:
        job, restart = (self._environ.get(f"SLURM_{n}", "") for n in ("JOB_ID", "RESTART_COUNT"))
        return int(job) if job.isdecimal() else None, int(restart) if restart.isdecimal() else 0

    def _is_gone(self, holder: str) -> bool:
        """Whether the holder cannot be alive. On this host a lock that is held has a live holder;
        elsewhere Slurm ends a job on its old nodes before it starts it again."""
        match = _HOLDER.fullmatch(holder)
        if match is None or match[3] is None or match[2] == socket.gethostname():
            return False
        job, restart = self._slurm_job()
        if int(match[3]) == job:
            return int(match[4]) < restart
        return has_no_nodes(int(match[3]))

    def _replace(self, holder: str) -> None:
        """Removes the file of a holder that is gone. Of several that find it so, one does it: the
        others find another text in it, or none."""
        guard = os.open(self._folder / f"{NAME}.stale", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._path.read_text(encoding="utf-8", errors="replace").strip() == holder:
                self._path.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
        finally:
            os.close(guard)

    def _busy(self, holder: str) -> str:
        elsewhere = (match := _HOLDER.fullmatch(holder)) and match[2] != socket.gethostname()
        hint = f"; if that process is gone, remove {self._path}" if elsewhere else ""
        return (
            f"{self._folder} is being written by {holder or 'another process'}: wait until that "
            f"run ends, or give this one another logger.log_dir{hint}"
        )


@contextmanager
def alone_in(folder: Path, advice: str) -> Iterator[None]:
    """One writer at a time in a folder that is no run's; it is made where it is missing.

    Raises `UserError` with the holder and `advice`, and for a folder that cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = RunLock(folder)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    except UserError as error:
        holder = writer_of(folder) or "another process"
        raise UserError(f"{folder} is being written by {holder}: {advice}") from error
    try:
        yield
    finally:
        lock.release()


def has_no_nodes(job_id: int) -> bool:
    """Whether Slurm says that a job has given its nodes back; False where it cannot be asked."""
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T"]
    environ = without_filters(os.environ)
    try:
        done = subprocess.run(
            command, env=environ, capture_output=True, text=True, errors="replace", timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    if done.returncode:
        return "Invalid job id" in done.stderr  # so long ago that Slurm has forgotten it
    # No line at all is no answer: a site may show other people's jobs to nobody.
    states = done.stdout.split()
    return bool(states) and WITHOUT_NODES.issuperset(states)


def without_filters(environ: Mapping[str, str]) -> dict[str, str]:
    """Without SQUEUE_PARTITION and its like, which would hide jobs."""
    return {name: value for name, value in environ.items() if not name.startswith("SQUEUE_")}


def writer_of(folder: Path) -> str | None:
    """Who writes a run folder now, as `RunLock` wrote it down; None where nobody does, or where
    the system does not tell. Only asks: it takes no lock."""
    if not sys.platform.startswith("linux"):
        return None
    if folder.resolve() in _held_here:  # to close the file here would give our own lock back
        return f"this process ({os.getpid()})"
    try:
        descriptor = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return None
    try:
        # fcntl(2), F_GETLK on 64 bits: type, whence, start, length, pid.
        asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind = struct.unpack("hhqqi", fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))[0]
        return None if kind == fcntl.F_UNLCK else _text(descriptor) or "another process"
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _text(descriptor: int) -> str:
    return os.pread(descriptor, 300, 0).decode("utf-8", "replace").strip()


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        there, held = os.stat(path), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino)

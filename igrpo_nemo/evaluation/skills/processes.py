"""Running `ns` to its end, with its output in a file, and ending it with all that it started.

NeMo-Skills starts each command in a session of its own and waits for a server without end. So a
process is ended by its descendants, and a server that stays silent ends the run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_S = 1.0
SILENT_S = 15.0
"""A server that refused connections for so long is taken for dead."""
GRACE_S = 10.0
"""Between asking a process to end and ending it."""


@dataclass(frozen=True, slots=True)
class Started:
    """A process, told from a later one of the same number by when it began."""

    pid: int
    since: str


class ServerDied(Exception):
    """The server stopped answering while it was needed."""


def run_logged(
    command: Sequence[str],
    log: Path,
    *,
    cwd: Path,
    environ: Mapping[str, str],
    alive: Callable[[], bool] = lambda: True,
    on_poll: Callable[[], None] = lambda: None,
) -> int:
    """Runs a command with stdout and stderr in `log`; returns its exit code.

    `on_poll` is called about once a second. Raises `ServerDied` once `alive` has been false for
    `SILENT_S` seconds. Whatever ends this call, no process of the command outlives it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=dict(environ),
        )
        seen = time.monotonic()
        below: list[Started] = []
        try:
            while process.poll() is None:
                below = descendants(process.pid)
                on_poll()
                if alive():
                    seen = time.monotonic()
                elif time.monotonic() - seen > SILENT_S:
                    raise ServerDied
                time.sleep(POLL_S)
            return process.returncode
        finally:
            _end(process, {*below, *descendants(process.pid)})


def server_answers(address: str) -> bool:
    """Whether something listens at an OpenAI-compatible address. A busy server counts as alive."""
    # A proxy would answer in the place of a dead server.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(f"{address.rstrip('/')}/models", timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError) as error:
        return isinstance(error, TimeoutError) or isinstance(
            getattr(error, "reason", None), TimeoutError
        )
    return True


def processes_with(word: str) -> list[int]:
    """The processes of this machine that have a word among their arguments that begins so."""
    listing = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,args="], capture_output=True, text=True, check=False
    ).stdout
    lines = (line.split() for line in listing.splitlines())
    return [int(pid) for pid, *args in lines if any(arg.startswith(word) for arg in args)]


def descendants(pid: int) -> list[Started]:
    """The processes that a process started, and theirs."""
    children: dict[int, list[Started]] = {}
    for parent, started in _running():
        children.setdefault(parent, []).append(started)
    found: list[Started] = []
    queue = [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += [started.pid for started in below]
    return found


def _running() -> list[tuple[int, Started]]:
    """(parent, process) of all processes."""
    listing = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,lstart="], capture_output=True, text=True, check=False
    ).stdout
    fields = [line.split(None, 2) for line in listing.splitlines()]
    return [(int(parent), Started(int(pid), since)) for pid, parent, since in fields]


def end_with_all(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it started: SIGTERM, and SIGKILL after `GRACE_S`."""
    _end(process, set(descendants(process.pid)))


def last_line(log: Path) -> str:
    """The last line of a log that says something, without the frame that `ns` draws around it."""
    lines = [line.strip(" ─│╭╮╰╯") for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it said nothing")


def _end(process: subprocess.Popen[bytes], below: set[Started]) -> None:
    """SIGTERM, and SIGKILL for those that are still there after `GRACE_S`."""
    deadline = time.monotonic() + GRACE_S
    if process.poll() is None:
        process.terminate()
    _signal(below, signal.SIGTERM)
    while time.monotonic() < deadline:
        if process.poll() is not None and not _still(below):
            return
        time.sleep(0.2)
    _signal(below, signal.SIGKILL)
    process.kill()
    process.wait()


def _still(processes: set[Started]) -> set[Started]:
    return processes & {started for _, started in _running()} if processes else set()


def _signal(processes: set[Started], number: int) -> None:
    for started in _still(processes):
        try:
            os.kill(started.pid, number)
        except (ProcessLookupError, PermissionError):
            continue

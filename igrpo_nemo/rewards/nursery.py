"""The processes that compare answers, as the pool's threads see them.

    Nursery: one process that forks workers       Worker: one of those, and the socket to it

The nursery is started from scratch, so nothing of the caller's process is forked; see
`rewards.worker` for what runs in it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import igrpo_nemo
from igrpo_nemo.rewards.accuracy import AccuracySettings, Reason
from igrpo_nemo.rewards.custom import Outcome
from igrpo_nemo.rewards.worker import settings_to_json

_START_LIMIT_S = 120.0
# A fresh fork now and then keeps SymPy's caches from growing.
_ITEMS_PER_WORKER = 5_000
# What a verifier needs of the environment; keys and tokens stay behind.
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "TMPDIR")

Pair = tuple[str, str | None]
"""A reference and an answer; without an answer, the question whether the reference can serve."""

Task = Pair | tuple[str, str, str]
"""A pair to compare; or a function's path, a problem's fields as JSON, and a completion."""


class Nursery:
    """The process that forks workers, and the socket to it. Used by several threads."""

    def __init__(
        self, settings: AccuracySettings, memory_limit_mb: int, functions: Sequence[str] = ()
    ) -> None:
        self._arguments = [settings_to_json(settings), str(memory_limit_mb), *functions]
        self._environment = _worker_environment(sys.path if functions else [])
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "igrpo_nemo.rewards.worker", str(theirs.fileno())]
                + self._arguments,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=self._environment,
            )
        ours.settimeout(_START_LIMIT_S)
        self._control = ours
        self._replies = ours.makefile("rb")
        self._ready = False
        self._workers: set[int] = set()

    @property
    def ours(self) -> bool:
        """Whether this is the process that started it, not a fork of that one."""
        return os.getpid() == self._owner

    def spawn(self) -> tuple[int, socket.socket]:
        """A new worker: its pid and the socket to it. Raises RuntimeError where none can start."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the verifier pool is closed")
            for attempt in range(2):
                try:
                    return self._spawn()
                except OSError as error:
                    if attempt:
                        raise RuntimeError(
                            f"the verifier processes do not start: {error}"
                        ) from None
                    self._stop()
                    self._start()
        raise AssertionError("unreachable")

    def _spawn(self) -> tuple[int, socket.socket]:
        if not self._ready:
            if self._replies.readline() != b"ready\n":
                raise OSError("no sign of life from igrpo_nemo.rewards.worker")
            self._ready = True
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [b'["spawn"]'], [theirs.fileno()])
            reply = self._replies.readline()
        if not reply:
            ours.close()
            raise OSError("igrpo_nemo.rewards.worker has ended")
        self._workers.add(int(reply))
        return int(reply), ours

    def process_ids(self) -> tuple[int, ...]:
        with self._lock:
            return (self._process.pid, *sorted(self._workers))

    def kill(self, pid: int) -> None:
        """End a worker and reap it; a worker that is already gone is reaped."""
        with self._lock:
            self._workers.discard(pid)
            try:
                self._control.sendall(json.dumps(["kill", pid]).encode())
                self._replies.readline()
            except OSError:
                return  # The nursery is gone, and its workers with it.

    def _stop(self) -> None:
        self._replies.close()
        self._control.close()
        try:
            self._process.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._stop()


def _worker_environment(more_paths: Sequence[str]) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT_VARIABLES or name.startswith("PYTHON")
    }
    source = str(Path(igrpo_nemo.__file__).resolve().parents[1])
    paths = [source, kept.get("PYTHONPATH", ""), *more_paths]
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


class Worker:
    """A worker process as its thread sees it."""

    def __init__(self, nursery: Nursery, item_timeout_s: float) -> None:
        self._nursery = nursery
        self._item_timeout_s = item_timeout_s
        self._pid, self._socket = nursery.spawn()
        self._items = 0

    @property
    def worn(self) -> bool:
        return self._items >= _ITEMS_PER_WORKER

    def result_of(self, task: Task) -> Reason | Outcome:
        """Raises TimeoutError at the limit and ConnectionError where the worker died."""
        self._items += 1
        limit = time.monotonic() + self._item_timeout_s
        self._socket.settimeout(self._item_timeout_s)
        self._socket.sendall(json.dumps(task).encode() + b"\n")
        reply = b""
        while not reply.endswith(b"\n"):
            self._socket.settimeout(max(1e-3, limit - time.monotonic()))
            received = self._socket.recv(4_096)
            if not received:
                raise ConnectionError("the worker died")
            reply += received
        (result,) = json.loads(reply)
        return Reason(result) if isinstance(result, str) else Outcome(*result)

    def end(self) -> None:
        self._nursery.kill(self._pid)
        self._socket.close()

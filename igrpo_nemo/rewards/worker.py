r"""The processes behind the pool: a supervisor that forks workers, each doing task after task.

    pool --[number, task]\n--> supervisor --task\n--> worker
    pool <--[number, result or null, seconds, crashes]\n-- supervisor <--[result]\n-- worker

The supervisor is started from scratch, so nothing of the pool's process is forked, and has imported
SymPy once, without torch. It is single-threaded, so a fork is safe and costs milliseconds where a
fresh interpreter costs half a second. At the time limit it kills a worker and forks another one.
Nothing outlives the pool's process: the supervisor ends when its socket closes or its parent
changes, and workers die with it. Run as `python -m igrpo_nemo.rewards.worker SOCKET_FD OPTIONS`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import pickle
import resource
import select
import signal
import socket
import sys
import time
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from igrpo_nemo.by_path import function_at
from igrpo_nemo.rewards.accuracy import (
    Reason,
    full_verdict,
    gold_verdict,
    warm_up,
)
from igrpo_nemo.rewards.custom import Outcome, outcome
from igrpo_nemo.types import Problem

_PR_SET_PDEATHSIG = 1
_PARENT_CHECK_S = 1.0
_CHUNK_BYTES = 1 << 20
# A fresh fork now and then keeps SymPy's caches from growing.
_TASKS_PER_WORKER = 5_000
_ATTEMPTS = 2

Pair = tuple[str, str | None]
"""A reference and an answer; without an answer, the question whether the reference can serve."""

Task = Pair | tuple[str, str, str]
"""A pair to compare; or a function's path, a problem's fields as JSON, and a completion."""


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What the processes run with; `functions` are paths of reward functions."""

    workers: int
    item_timeout_s: float
    memory_limit_mb: int
    functions: Sequence[str] = ()

    def arguments(self, fd: int) -> list[str]:
        """The command line of a supervisor that listens to this descriptor."""
        return [sys.executable, "-m", __name__, str(fd), pickle.dumps(self).hex()]


@dataclass(slots=True)
class _Job:
    number: int
    task: list[Any]
    crashes: int = 0


class _Worker:
    """A forked process, the socket to it, and the job that it has."""

    def __init__(self, options: WorkerOptions, inherited: Sequence[socket.socket]) -> None:
        self.socket, theirs = socket.socketpair()
        self.job: _Job | None = None
        self.since = 0.0
        self._reply = b""
        self.tasks = 0
        supervisor = os.getpid()
        self._pid = os.fork()
        if self._pid:
            theirs.close()
            return
        # In the worker: os._exit on every path, so that it never returns into the loop above.
        status = 1
        try:
            _die_with_parent(supervisor)
            for each in (self.socket, *inherited):
                each.close()
            _limit_memory(options.memory_limit_mb)
            sys.setrecursionlimit(3_000)
            _serve(theirs)
            status = 0
        finally:
            os._exit(status)

    def begin(self, job: _Job) -> None:
        """Raises OSError where the process has died."""
        self.job, self.since, self._reply = job, time.monotonic(), b""
        self.tasks += 1
        self.socket.sendall(json.dumps(job.task).encode() + b"\n")

    def result(self) -> Any:
        """What it replied; None while the reply is on its way. Raises OSError where it died."""
        received = self.socket.recv(_CHUNK_BYTES)
        if not received:
            raise ConnectionError("the worker died")
        self._reply += received
        return json.loads(self._reply)[0] if received.endswith(b"\n") else None

    def end(self) -> None:
        self.socket.close()
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


class _Supervisor:
    def __init__(self, control: socket.socket, options: WorkerOptions) -> None:
        self._control = control
        self._options = options
        self._waiting: deque[_Job] = deque()
        self._workers: list[_Worker] = []
        self._workers = [self._forked() for _ in range(options.workers)]

    def _forked(self) -> _Worker:
        return _Worker(self._options, [self._control, *(each.socket for each in self._workers)])

    def run(self) -> None:
        """Until the pool's process closes the socket, or is gone."""
        parent, unread = os.getppid(), b""
        self._control.sendall(b"[null]\n")  # Ready.
        while os.getppid() == parent:
            busy = {each.socket: each for each in self._workers if each.job is not None}
            for ready in select.select([self._control, *busy], [], [], self._pause(busy))[0]:
                if ready is not self._control:
                    self._hear(busy[ready])
                    continue
                received = self._control.recv(_CHUNK_BYTES)
                if not received:
                    return
                *lines, unread = (unread + received).split(b"\n")
                for line in lines:
                    self._take(json.loads(line))
            for worker in [each for each in self._workers if each.job is not None]:
                if time.monotonic() - worker.since >= self._options.item_timeout_s:
                    self._finish(worker, None, replace=True)
            for worker in [each for each in self._workers if each.job is None]:
                if self._waiting:
                    self._start(worker, self._waiting.popleft())

    def close(self) -> None:
        for worker in self._workers:
            worker.end()

    def _pause(self, busy: dict[socket.socket, _Worker]) -> float:
        """Seconds until the first limit, or the next look at the parent."""
        ends = [each.since + self._options.item_timeout_s for each in busy.values()]
        return max(0.0, min([_PARENT_CHECK_S, *(end - time.monotonic() for end in ends)]))

    def _take(self, message: list[Any]) -> None:
        """A number and its task, or the numbers that nobody waits for any more."""
        if isinstance(message[0], list):
            dropped = set(message[0])
            self._waiting = deque(each for each in self._waiting if each.number not in dropped)
        else:
            self._waiting.append(_Job(*message))

    def _start(self, worker: _Worker, job: _Job) -> None:
        try:
            worker.begin(job)
        except OSError:
            self._crashed(worker)

    def _hear(self, worker: _Worker) -> None:
        try:
            result = worker.result()
        except OSError:
            self._crashed(worker)
        else:
            if result is not None:
                self._finish(worker, result, replace=worker.tasks >= _TASKS_PER_WORKER)

    def _crashed(self, worker: _Worker) -> None:
        """A job under which a worker died has another try."""
        assert (job := worker.job) is not None
        job.crashes += 1
        if job.crashes >= _ATTEMPTS:
            self._finish(worker, None, replace=True)
        else:
            self._start(self._replaced(worker), job)

    def _finish(self, worker: _Worker, result: Any, *, replace: bool) -> None:
        assert (job := worker.job) is not None
        worker.job = None
        since = worker.since
        if replace:
            self._replaced(worker)
        told = [job.number, result, time.monotonic() - since, job.crashes]
        self._control.sendall(json.dumps(told).encode() + b"\n")

    def _replaced(self, worker: _Worker) -> _Worker:
        worker.end()
        at = self._workers.index(worker)
        del self._workers[at]
        self._workers.insert(at, self._forked())
        return self._workers[at]


def _serve(connection: socket.socket) -> None:
    """A worker's life: read a task, reply with its result, until the socket closes."""
    with connection, connection.makefile("rwb") as stream:
        for line in stream:
            stream.write(json.dumps([_result_of(json.loads(line))]).encode() + b"\n")
            stream.flush()


def _result_of(task: list[Any]) -> Reason | Outcome:
    try:
        if len(task) == 3:
            path, problem, text = task
            return outcome(path, Problem(*json.loads(problem)), text)
        gold, answer = task
        return gold_verdict(gold) if answer is None else full_verdict(gold, answer)
    except Exception:  # The boundary to SymPy: whatever it raises is the answer's fault.
        return Reason.UNPARSEABLE


def _limit_memory(memory_limit_mb: int) -> None:
    if sys.platform == "linux":  # Others have no such limit, or do not keep it.
        limit = memory_limit_mb * 1024 * 1024
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _die_with_parent(supervisor: int) -> None:
    """Linux: ask the kernel to end this worker when the supervisor ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:
        os._exit(1)


def main(fd: str, pickled: str) -> None:
    warnings.simplefilter("ignore")
    # The pool's process owns the terminal's signals; this one ends when that one does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=int(fd))
    options: WorkerOptions = pickle.loads(bytes.fromhex(pickled))
    warm_up()
    for path in options.functions:
        function_at(path)
    gc.freeze()  # Keeps the collector of the workers from copying the shared pages.
    supervisor = _Supervisor(control, options)
    try:
        supervisor.run()
    except (BrokenPipeError, ConnectionResetError):
        pass
    finally:
        supervisor.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

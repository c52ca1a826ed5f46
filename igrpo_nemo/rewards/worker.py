r"""The processes behind the pool: a nursery that forks workers, each comparing pair after pair.

    pool --control socket: spawn + a socket, kill--> nursery (SymPy imported once, no torch)
    pool --worker socket: [gold, answer]\n--> worker --["match"]\n--> pool
                          [path, problem, completion]\n  [[parts, error]]\n

The nursery is single-threaded, so a fork is safe and costs milliseconds where a fresh interpreter
costs half a second: a killed worker is replaced at once. Nothing outlives the pool's process: the
nursery ends when its control socket closes or its parent changes, and workers die with it.
Run as `python -m igrpo_nemo.rewards.worker CONTROL_FD SETTINGS_JSON MEMORY_LIMIT_MB [PATH ...]`,
the paths those of reward functions, whose modules are imported once as well.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from igrpo_nemo.rewards.accuracy import (
    AccuracySettings,
    Reason,
    full_verdict,
    gold_verdict,
    warm_up,
)
from igrpo_nemo.rewards.custom import Outcome, function_at, outcome
from igrpo_nemo.rewards.extract import AnswerFormat
from igrpo_nemo.types import Problem

_PR_SET_PDEATHSIG = 1
_PARENT_CHECK_S = 1.0
MAX_MESSAGE_BYTES = 1 << 24


def settings_to_json(settings: AccuracySettings) -> str:
    return json.dumps(
        {name: getattr(settings, name) for name in AccuracySettings.__dataclass_fields__}
    )


def settings_from_json(text: str) -> AccuracySettings:
    fields = json.loads(text)
    fields["answer_format"] = AnswerFormat(fields["answer_format"])
    fields["match_types"] = tuple(fields["match_types"])
    return AccuracySettings(**fields)


def serve(connection: socket.socket, settings: AccuracySettings) -> None:
    """A worker's life: read a task, reply with its result, until the pool closes the socket."""
    with connection, connection.makefile("rwb") as stream:
        while line := stream.readline(MAX_MESSAGE_BYTES):
            stream.write(json.dumps([_result_of(json.loads(line), settings)]).encode() + b"\n")
            stream.flush()


def _result_of(task: list[Any], settings: AccuracySettings) -> Reason | Outcome:
    try:
        if len(task) == 3:
            path, problem, text = task
            return outcome(path, Problem(*json.loads(problem)), text)
        gold, answer = task
        if answer is None:
            return gold_verdict(gold, settings)
        return full_verdict(gold, answer, settings)
    except Exception:  # The boundary to SymPy: whatever it raises is the answer's fault.
        return Reason.UNPARSEABLE


def _limit_memory(memory_limit_mb: int) -> None:
    if sys.platform == "linux":  # Others have no such limit, or do not keep it.
        limit = memory_limit_mb * 1024 * 1024
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _die_with_parent(nursery_pid: int) -> None:
    """Linux: ask the kernel to end this worker when the nursery ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != nursery_pid:
        os._exit(1)


def _fork_worker(
    control: socket.socket, fd: int, settings: AccuracySettings, memory_limit_mb: int
) -> int:
    nursery_pid = os.getpid()
    pid = os.fork()
    if pid:
        os.close(fd)
        return pid
    # In the worker: os._exit on every path, so that it never returns into the nursery's loop.
    status = 1
    try:
        _die_with_parent(nursery_pid)
        control.close()
        _limit_memory(memory_limit_mb)
        sys.setrecursionlimit(3_000)
        serve(socket.socket(fileno=fd), settings)
        status = 0
    finally:
        os._exit(status)


def _kill(pid: int, children: set[int]) -> None:
    if pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        children.discard(pid)


def run_nursery(
    control: socket.socket,
    settings: AccuracySettings,
    memory_limit_mb: int,
    functions: Sequence[str] = (),
) -> None:
    """Serve `spawn` (with a socket attached) and `kill` until the pool's process is gone.

    Replies to `spawn` with the worker's pid and to `kill` with the pid killed, a line each.
    """
    parent = os.getppid()
    children: set[int] = set()
    warm_up()
    for path in functions:
        function_at(path)
    gc.freeze()  # Keeps the collector of the workers from copying the shared pages.
    control.sendall(b"ready\n")
    while os.getppid() == parent:
        if not select.select([control], [], [], _PARENT_CHECK_S)[0]:
            continue
        try:
            message, fds, _, _ = socket.recv_fds(control, 64, 1)
        except OSError:
            break
        if not message:
            break
        request: list[Any] = json.loads(message)
        if request[0] == "spawn":
            pid = _fork_worker(control, fds[0], settings, memory_limit_mb)
            children.add(pid)
        else:
            pid = int(request[1])
            _kill(pid, children)
        control.sendall(f"{pid}\n".encode())
    for pid in list(children):
        _kill(pid, children)


def main(arguments: list[str]) -> None:
    control_fd, settings, memory_limit_mb, *functions = arguments
    warnings.simplefilter("ignore")
    # The pool's process owns the terminal's signals; this one ends when that one does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=int(control_fd))
    try:
        run_nursery(control, settings_from_json(settings), int(memory_limit_mb), functions)
    except (BrokenPipeError, ConnectionResetError):
        pass


if __name__ == "__main__":
    main(sys.argv[1:])

"""A pool of verifier processes: an accuracy verdict for every completion, in time, in order.
Functions of the user's own (`rewards.custom`) run in them too.

    caller: extract, quick verdict (microseconds) --what is left, once each--> supervisor, workers
    caller: waits until all are back or the group's deadline, then fills in the fallback
    listener (a thread): results from the supervisor; starts it again where it died

The caller may be any thread, an event loop's (`asyncio.to_thread`) or a Ray actor: no signal
handler is installed and no process is forked from it. See `rewards.worker` for the processes.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import igrpo_nemo
from igrpo_nemo.errors import UserError
from igrpo_nemo.rewards.accuracy import Reason, Verdict, find_answer, quick_verdict
from igrpo_nemo.rewards.custom import NO_REPLY, Outcome
from igrpo_nemo.rewards.extract import AnswerFormat
from igrpo_nemo.rewards.worker import Pair, Task, WorkerOptions
from igrpo_nemo.types import ScoreRequest

_CACHE_ENTRIES = 65_536
_START_LIMIT_S = 120.0
_STARTS = 3
# What a verifier needs of the environment; keys and tokens stay behind.
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "TMPDIR")


@dataclass(slots=True)
class PoolStats:
    """Counts since the pool started."""

    quick: int = 0
    """Verdicts that needed no process (no answer, too long, plain numbers, cached)."""
    compared: int = 0
    """Verdicts a worker returned."""
    timeouts: int = 0
    """Workers killed at the item limit."""
    crashes: int = 0
    """Workers that died under an item (memory, stack, or killed from outside)."""
    missed_deadline: int = 0
    """Items that got the fallback at a group's deadline."""
    slowest_s: float = 0.0
    """Seconds of the longest comparison, the killing of its worker included."""


class _Call:
    """What one call waits for, and what came back."""

    def __init__(self, tasks: int) -> None:
        self.results: dict[Task, Any] = {}
        self.error = ""
        self.left = tasks
        self.done = threading.Event()


class _Processes:
    """The supervisor, what it was asked, and the thread that listens to it. Knows no pool."""

    def __init__(self, options: WorkerOptions) -> None:
        self.stats = PoolStats()
        self.ready = threading.Event()
        self._options = options
        self._environment = _worker_environment(sys.path if options.functions else [])
        self._owner = os.getpid()
        self._closed = False
        self._numbers = itertools.count()
        self._asked: dict[int, tuple[_Call, Task]] = {}
        self._state = threading.Lock()
        self._sending = threading.Lock()  # Not the same: the listener must go on while one sends.
        self._start()
        self._listener = threading.Thread(target=self._listen, name="verifier", daemon=True)
        self._listener.start()

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                self._options.arguments(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=self._environment,
            )

    def results(self, tasks: Sequence[Task], deadline: float) -> dict[Task, Any]:
        """What came back until the deadline, by task. Raises RuntimeError where nothing can."""
        call = _Call(len(tasks))
        with self._state:
            if self._closed:
                raise RuntimeError("the verifier pool is closed")
            numbered = dict(zip(self._numbers, tasks, strict=False))
            self._asked.update({number: (call, task) for number, task in numbered.items()})
        self._send(numbered.items())
        call.done.wait(None if deadline == math.inf else max(0.0, deadline - time.monotonic()))
        with self._state:
            late = [number for number in numbered if self._asked.pop(number, None)]
            self.stats.missed_deadline += len(late)
        if call.error:
            raise RuntimeError(call.error)
        if late:
            self._send([(late,)])
        return call.results

    def _send(self, messages: Iterable[Sequence[Any]]) -> None:
        text = "".join(json.dumps(message) + "\n" for message in messages)
        try:
            with self._sending:
                self._socket.sendall(text.encode())
        except OSError:
            pass  # The supervisor has died: the listener asks its successor.

    def _listen(self) -> None:
        silent = 0
        while True:
            silent += 1
            try:
                for line in self._socket.makefile("rb"):
                    silent = 0
                    self._hear(*json.loads(line))
            except OSError:
                pass  # As at the end of the stream: it has died.
            with self._sending, self._state:
                self._socket.close()
                if self._closed:
                    return
                self.process.wait()
                if silent == _STARTS:
                    break
                self._start()
                asked = {number: task for number, (_, task) in self._asked.items()}
            self._send(asked.items())
        self._fail("the verifier processes do not start: igrpo_nemo.rewards.worker ends at once")

    def _hear(self, number: int | None, result: Any = None, seconds: float = 0, crashes: int = 0):
        if number is None:
            return self.ready.set()
        with self._state:
            stats = self.stats
            stats.slowest_s = max(stats.slowest_s, seconds)
            stats.crashes += crashes
            stats.compared += result is not None
            stats.timeouts += result is None and crashes < 2
            call, task = self._asked.pop(number, (None, None))
            if call is None or task is None:
                return  # Its call has given up.
            if isinstance(result, list):
                call.results[task] = Outcome(*result)
            else:
                call.results[task] = Reason.TIMEOUT if result is None else Reason(result)
            call.left -= 1
            if not call.left:
                call.done.set()

    def _fail(self, why: str) -> None:
        with self._state:
            self._closed = True
            for call, _ in self._asked.values():
                call.error = why
                call.done.set()

    def close(self) -> None:
        """Ends the processes and the thread; waits for them. Safe to call twice."""
        if os.getpid() != self._owner:
            return  # In a fork of the process that made the pool: nothing here is this one's.
        self._fail("the verifier pool was closed")
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # It has closed by itself.
        try:
            self.process.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._listener.join(timeout=5.0)


def _worker_environment(more_paths: Sequence[str]) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT_VARIABLES or name.startswith("PYTHON")
    }
    source = str(Path(igrpo_nemo.__file__).resolve().parents[1])
    paths = [source, kept.get("PYTHONPATH", ""), *more_paths]
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


class VerifierPool:
    """Accuracy verdicts from worker processes that cannot hang, crash or bloat the caller.

    Each answer has `item_timeout_s` seconds, after which its worker is killed and replaced and the
    item's reason is `timeout`; `memory_limit_mb` limits a worker's address space; a call returns
    at the latest `group_deadline_s` seconds after it began, with reason `timeout` for what is
    missing. Equal (reference, answer) pairs are compared once and remembered.

    Raises UserError for limits that are not positive, RuntimeError where the processes cannot
    start.
    """

    def __init__(
        self,
        *,
        workers: int = 2,
        item_timeout_s: float = 5.0,
        group_deadline_s: float = 60.0,
        memory_limit_mb: int = 1_024,
        answer_format: AnswerFormat = AnswerFormat.ANY,
        functions: Sequence[str] = (),
    ) -> None:
        for name, value, least in (
            ("num_workers", workers, 1),
            ("item_timeout_s", item_timeout_s, 1e-3),
            ("group_deadline_s", group_deadline_s, 1e-3),
            ("memory_limit_mb", memory_limit_mb, 512),
        ):
            if value < least:
                raise UserError(f"env.math.{name} is {value}: it must be at least {least}")
        self._format = answer_format
        self._workers = workers
        self._group_deadline_s = group_deadline_s
        self._cache: dict[Pair, Reason] = {}
        self._lock = threading.Lock()
        self._processes = _Processes(
            WorkerOptions(workers, item_timeout_s, memory_limit_mb, functions)
        )
        # Also runs when the pool is forgotten, and at the interpreter's end.
        self._finalizer = weakref.finalize(self, self._processes.close)

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def stats(self) -> PoolStats:
        return self._processes.stats

    def verdicts(self, requests: Sequence[ScoreRequest]) -> list[Verdict]:
        """The verdicts of one group of completions, in order, within the group's deadline."""
        deadline = time.monotonic() + self._group_deadline_s
        found = [
            find_answer(
                request.problem.answer,
                request.text,
                self._format,
                thinking_open=request.thinking_open,
                truncated=request.truncated,
            )
            for request in requests
        ]
        reasons: dict[Pair, Reason] = {}
        slow: list[Pair] = []
        for request, answer in zip(requests, found, strict=True):
            if isinstance(answer, Verdict) or (request.problem.answer, answer) in reasons:
                continue
            pair = request.problem.answer, answer
            reason = quick_verdict(*pair) or self._cache.get(pair)
            reasons[pair] = reason or Reason.TIMEOUT  # The fallback, until a worker says better.
            if reason is None:
                slow.append(pair)
        reasons.update(self._compare(slow, deadline))
        with self._lock:
            self.stats.quick += len(requests) - len(slow)
        return [
            answer
            if isinstance(answer, Verdict)
            else Verdict(reasons[request.problem.answer, answer], answer)
            for request, answer in zip(requests, found, strict=True)
        ]

    def outcomes(self, path: str, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """What one of `functions` says of each, in order, within the group's deadline."""
        deadline = time.monotonic() + self._group_deadline_s
        tasks = [(path, json.dumps(astuple(each.problem)), each.text) for each in requests]
        found = self._results(list(dict.fromkeys(tasks)), deadline)
        results = [found.get(task) for task in tasks]
        return [each if isinstance(each, Outcome) else NO_REPLY for each in results]

    def check_golds(self, golds: Sequence[str]) -> list[Reason]:
        """`accuracy.gold_verdict` for each, in order, with the item limit and no group deadline."""
        self.warm_up()
        reasons = self._compare([(gold, None) for gold in dict.fromkeys(golds)], math.inf)
        return [reasons[gold, None] for gold in golds]

    def warm_up(self) -> None:
        """Wait until every process is up and has compared something: otherwise the first group
        waits for them."""
        if not self._processes.ready.wait(_START_LIMIT_S):
            raise RuntimeError("the verifier processes do not start: no sign of life")
        first = [("\\sqrt{2}", f"{index} + \\sqrt{{2}}") for index in range(self._workers)]
        self._processes.results(first, math.inf)

    def process_ids(self) -> tuple[int, ...]:
        """The supervisor's and its workers' process ids, for measurements and tests, on Linux."""
        pid = self._processes.process.pid
        workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return (pid, *map(int, workers))

    def _compare(self, pairs: list[Pair], deadline: float) -> dict[Pair, Reason]:
        reasons: dict[Any, Reason] = self._results(pairs, deadline)
        if len(self._cache) > _CACHE_ENTRIES:
            self._cache.clear()
        self._cache.update(reasons)
        return reasons

    def _results(self, tasks: Sequence[Task], deadline: float) -> dict[Any, Any]:
        if not tasks and self._finalizer.alive:
            return {}
        return self._processes.results(tasks, deadline)

    def metrics(self) -> dict[str, float]:
        """The counts of `stats` by name."""
        counts = asdict(self.stats)
        del counts["slowest_s"]  # It is no count: a step's share of it cannot be told.
        return {name: float(value) for name, value in counts.items()}

    def close(self) -> None:
        """End the thread and the processes; waits for them. Safe to call twice."""
        self._finalizer()

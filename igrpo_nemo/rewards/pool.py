"""A pool of verifier processes: an accuracy verdict for every completion, in time, in order.
Functions of the user's own (`rewards.custom`) run in them too.

    caller: extract, quick verdict (microseconds) --what is left, once each--> bounded queue
    one thread per worker: answer --socket--> worker process --> reason, or SIGKILL at the limit
    caller: waits until all are back or the group's deadline, then fills in the fallback

The caller may be any thread, an event loop's (`asyncio.to_thread`) or a Ray actor: no signal
handler is installed and no process is forked from it. See `rewards.nursery` for the processes.
"""

from __future__ import annotations

import json
import math
import queue
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

from igrpo_nemo.errors import UserError
from igrpo_nemo.rewards.accuracy import (
    DEFAULT_SETTINGS,
    AccuracySettings,
    Reason,
    Verdict,
    find_answer,
    quick_verdict,
)
from igrpo_nemo.rewards.custom import NO_REPLY, Outcome
from igrpo_nemo.rewards.nursery import Nursery, Pair, Task, Worker
from igrpo_nemo.types import ScoreRequest

_CACHE_ENTRIES = 65_536


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


class _Batch:
    """What one call waits for: tasks still out, and the results that came back."""

    def __init__(self, tasks: int) -> None:
        self.results: dict[Task, Any] = {}
        self.error: Exception | None = None
        self.abandoned = False
        self._left = tasks
        self._lock = threading.Lock()
        self.done = threading.Event()

    def put(self, task: Task, result: Reason | Outcome) -> None:
        with self._lock:
            self.results[task] = result
            self._left -= 1
            if self._left == 0:
                self.done.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.done.set()


_Job = tuple[_Batch, Task]


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
        queue_size: int = 4_096,
        settings: AccuracySettings = DEFAULT_SETTINGS,
        functions: Sequence[str] = (),
    ) -> None:
        for name, value in (
            ("num_workers", workers),
            ("item_timeout_s", item_timeout_s),
            ("group_deadline_s", group_deadline_s),
        ):
            if value <= 0:
                raise UserError(f"env.math.{name} is {value}: it must be greater than 0")
        if memory_limit_mb < 512:
            raise UserError(
                f"env.math.memory_limit_mb is {memory_limit_mb}: a verifier needs at least 512"
            )
        self.settings = settings
        self.stats = PoolStats()
        self._stats_lock = threading.Lock()
        self._item_timeout_s = item_timeout_s
        self._group_deadline_s = group_deadline_s
        self._cache: OrderedDict[Pair, Reason] = OrderedDict()
        self._cache_lock = threading.Lock()
        self._jobs: queue.Queue[_Job | None] = queue.Queue(maxsize=queue_size)
        self._nursery = Nursery(settings, memory_limit_mb, functions)
        self._closed = False
        self._threads = [
            threading.Thread(
                target=_work,
                args=(self._jobs, self._nursery, item_timeout_s, self.stats, self._stats_lock),
                name=f"verifier-{index}",
                daemon=True,
            )
            for index in range(workers)
        ]
        for thread in self._threads:
            thread.start()
        # Also runs when the pool is forgotten, and at the interpreter's end.
        self._finalizer = weakref.finalize(self, _shut_down, self._jobs, self._nursery, workers)

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def verdicts(self, requests: Sequence[ScoreRequest]) -> list[Verdict]:
        """The verdicts of one group of completions, in order, within the group's deadline."""
        deadline = time.monotonic() + self._group_deadline_s
        found = [
            find_answer(
                request.problem.answer,
                request.text,
                self.settings,
                thinking_open=request.thinking_open,
                truncated=request.truncated,
            )
            for request in requests
        ]
        reasons: dict[Pair, Reason] = {}
        slow: list[Pair] = []
        for request, answer in zip(requests, found, strict=True):
            if isinstance(answer, Verdict):
                continue
            gold = request.problem.answer
            if (gold, answer) not in reasons:
                reason = quick_verdict(gold, answer, self.settings) or self._cached((gold, answer))
                # The fallback, until a worker says better.
                reasons[gold, answer] = reason or Reason.TIMEOUT
                if reason is None:
                    slow.append((gold, answer))
        reasons.update(self._compare(slow, deadline))
        with self._stats_lock:
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
        reasons = self._compare([(gold, None) for gold in dict.fromkeys(golds)], math.inf)
        return [reasons[gold, None] for gold in golds]

    def warm_up(self) -> None:
        """Wait until the processes are up: otherwise the first group waits for them."""
        batch = _Batch(len(self._threads))
        for index in range(len(self._threads)):
            self._jobs.put((batch, ("\\sqrt{2}", f"{index} + \\sqrt{{2}}")))
        batch.done.wait()
        if batch.error is not None:
            raise batch.error

    def process_ids(self) -> tuple[int, ...]:
        """The nursery's and its workers' process ids, for measurements and tests."""
        return self._nursery.process_ids()

    def _compare(self, pairs: list[Pair], deadline: float) -> dict[Pair, Reason]:
        reasons: dict[Pair, Reason] = self._results(pairs, deadline)
        with self._cache_lock:
            self._cache.update(reasons)
            while len(self._cache) > _CACHE_ENTRIES:
                self._cache.popitem(last=False)
        return reasons

    def _results(self, tasks: Sequence[Task], deadline: float) -> dict[Any, Any]:
        """What came back until the deadline, by task."""
        if self._closed:
            raise RuntimeError("the verifier pool is closed")
        if not tasks:
            return {}
        batch = _Batch(len(tasks))
        for task in tasks:
            try:
                self._jobs.put((batch, task), timeout=_seconds_to(deadline))
            except queue.Full:
                break
        batch.done.wait(_seconds_to(deadline))
        batch.abandoned = True
        if batch.error is not None:
            raise batch.error
        results = dict(batch.results)
        with self._stats_lock:
            self.stats.missed_deadline += len(tasks) - len(results)
        return results

    def _cached(self, pair: Pair) -> Reason | None:
        with self._cache_lock:
            return self._cache.get(pair)

    def metrics(self) -> dict[str, float]:
        """The counts of `stats` by name."""
        with self._stats_lock:
            return {name: float(value) for name, value in asdict(self.stats).items()}

    def close(self) -> None:
        """End the threads and processes; waits for them. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._finalizer()
        for thread in self._threads:
            thread.join(timeout=self._item_timeout_s + 5.0)


def _seconds_to(deadline: float) -> float | None:
    return None if deadline == math.inf else max(0.0, deadline - time.monotonic())


def _shut_down(jobs: queue.Queue[_Job | None], nursery: Nursery, threads: int) -> None:
    """Drop what is queued, end the processes, and tell the threads to end."""
    if not nursery.ours:
        return  # In a fork of the process that made the pool: nothing here is this one's.
    while True:
        try:
            job = jobs.get_nowait()
        except queue.Empty:
            break
        if job is not None:
            job[0].fail(RuntimeError("the verifier pool was closed"))
    nursery.close()
    for _ in range(threads):
        jobs.put(None)


def _work(
    jobs: queue.Queue[_Job | None],
    nursery: Nursery,
    item_timeout_s: float,
    stats: PoolStats,
    stats_lock: threading.Lock,
) -> None:
    """A worker's thread: one task at a time, until None. Does not hold on to the pool."""
    worker: Worker | None = None

    def result_of(task: Task) -> Reason | Outcome:
        """The task's result; a worker that died under it gives it one more try."""
        nonlocal worker
        for _ in range(2):
            if worker is not None and worker.worn:
                worker.end()
                worker = None
            worker = worker or Worker(nursery, item_timeout_s)
            start = time.monotonic()
            result = late = None
            try:
                result = worker.result_of(task)
            except OSError as error:
                late = isinstance(error, TimeoutError)
                worker.end()
                worker = None
            with stats_lock:
                stats.slowest_s = max(stats.slowest_s, time.monotonic() - start)
                stats.compared += result is not None
                stats.timeouts += late is True
                stats.crashes += late is False
            if result is not None:
                return result
            if late:
                break
        return Reason.TIMEOUT

    while (job := jobs.get()) is not None:
        batch, task = job
        if batch.abandoned:
            continue
        try:
            batch.put(task, result_of(task))
        except RuntimeError as error:
            batch.fail(error)
    if worker is not None:
        worker.end()

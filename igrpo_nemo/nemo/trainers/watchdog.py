"""How a failure in an actor ends the run.

    rollout in NeMo-RL's collector ─ Reporter ─> actor ─> Watchdog, a thread of the driver
                                                          interrupts the trainer, raises the error

`async_grpo_train` rolls out in the threads of an actor, which print an error and sample something
else; where every rollout fails, or the actor dies, it would wait for ever.

The interrupt is a SIGINT of the driver to itself, which also ends a wait for a lock. A driver that
a script has put in the background ignores SIGINT; it goes on ignoring any other.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from igrpo_nemo.nemo.failure import REPORT_S, LostProcessError, Reporter, RolloutError

POLL_S = 5.0
"""Seconds between two looks at an actor that rolls out."""
ENDING_S = 20.0
"""Seconds that a trainer which has ended its actors has to return."""


def _gone(error: RayActorError) -> LostProcessError:
    reason = " ".join(str(error).split())
    return LostProcessError(f"the process that rolls out is gone: {reason}")


def _failure(text: str, lost: bool) -> RolloutError:
    return LostProcessError(text) if lost else RolloutError(text)


class _FirstFailure:
    """Actor: keeps the first report, and lets one caller wait for it."""

    def __init__(self) -> None:
        self._reported = asyncio.Event()
        self._first = ("", False)

    async def report(self, text: str, lost: bool) -> None:
        """`lost`: a process is gone."""
        if not self._reported.is_set():
            self._first = (text, lost)
            self._reported.set()

    async def watch(self, actor: Any) -> None:
        """Reports when an actor is gone: not at once, for a trainer that ends kills it too."""
        try:
            while True:
                await actor.__ray_ready__.remote()
                await asyncio.sleep(POLL_S)
        except RayActorError as error:
            await asyncio.sleep(ENDING_S)
            await self.report(str(_gone(error)), True)

    async def wait(self) -> tuple[str, bool]:
        await self._reported.wait()
        return self._first


class Watchdog:
    """While it is entered, a reported failure is raised from the body as `RolloutError`.

    To be entered in the main thread, which is what gets interrupted.
    """

    def __init__(self) -> None:
        self._actor: Any = ray.remote(num_cpus=0)(_FirstFailure).remote()
        self._lock = threading.Lock()
        self._over = False
        self._failure: RolloutError | None = None
        self.reporter = Reporter(self._actor)

    def _watch(self) -> None:
        try:
            first: Any = ray.get(self._actor.wait.remote())
        except RayError:  # the run is over, and the actor with it
            return
        with self._lock:
            if not self._over:
                self._failure = _failure(*first)
                main = threading.main_thread().ident
                assert main is not None
                signal.pthread_kill(main, signal.SIGINT)

    def _reported_late(self, error: RayError) -> RolloutError | None:
        """What an actor has reported that an error of Ray's comes from; itself where it is gone."""
        if isinstance(error, RayActorError):
            return _gone(error)
        done, _ = ray.wait([self._actor.wait.remote()], timeout=REPORT_S)
        return _failure(*ray.get(done[0])) if done else None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """A SIGINT raises `KeyboardInterrupt` in the body where a failure is reported; without one
        it does what it did before."""
        before = signal.getsignal(signal.SIGINT)

        def interrupted(number: int, frame: FrameType | None) -> None:
            if self._failure is not None:
                raise KeyboardInterrupt
            if callable(before):
                before(number, frame)

        signal.signal(signal.SIGINT, interrupted)
        threading.Thread(target=self._watch, name="igrpo-watchdog", daemon=True).start()
        try:
            try:
                yield
            finally:
                with self._lock:
                    self._over = True
        except (KeyboardInterrupt, RayError) as error:
            # NeMo-RL's main sees an actor's error by itself, be it before the interrupt or after.
            if self._failure is None and not isinstance(error, KeyboardInterrupt):
                self._failure = self._reported_late(error)
            if self._failure is None:
                raise
            raise self._failure from None
        finally:
            signal.signal(signal.SIGINT, before)
            ray.kill(self._actor)

"""The error of a rollout: which problem, which stage; whether a process is gone; how it ends a run.

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

from igrpo_nemo.errors import UserError
from igrpo_nemo.types import Problem

REPORT_S = 10.0
"""Seconds that a report may take to come."""
POLL_S = 5.0
"""Seconds between two looks at an actor that rolls out."""
ENDING_S = 20.0
"""Seconds that a trainer which has ended its actors has to return."""


class RolloutError(RuntimeError):
    """A problem's rollout failed; its group would be incomplete, so the step must not go on."""

    @classmethod
    @contextmanager
    def at(cls, problem: Problem, stage: str) -> Iterator[None]:
        """Names problem and stage in whatever is raised inside; keeps a `RolloutError` as it is."""
        try:
            yield
        except RolloutError:
            raise
        except Exception as error:
            reason = _in_a_line(error) or type(error).__name__
            raise cls(f"problem {problem.id}, stage {stage}: {reason[:500]}") from error


class LostProcessError(RolloutError):
    """Ray lost a process of the run: with it a node, or memory; not a fault of what was asked.

    `exit_code` tells a launcher that starting again may help.
    """

    exit_code = 70


def _in_a_line(error: object) -> str:
    return " ".join(str(error).split())[:1_000]


def is_lost_process(error: BaseException | None) -> bool:
    """Whether an actor, a worker, a node or what they held is gone, at the bottom of an error."""
    from ray import exceptions

    if error is None:
        return False
    gone = (exceptions.RayActorError, exceptions.NodeDiedError, exceptions.ObjectLostError)
    if isinstance(error, (*gone, exceptions.WorkerCrashedError)):
        return True
    # By name: a checker without Ray takes the class for `Unknown` and the error for no such thing.
    task = isinstance(error, exceptions.RayTaskError)
    below = getattr(error, "cause", None) if task else None
    return is_lost_process(below or error.__cause__)


@contextmanager
def named_errors() -> Iterator[None]:
    """Raises `LostProcessError` for whatever a lost process made of the body, and the errors that
    one line says all of as they were in a worker: the traceback is Ray's message."""
    from ray.exceptions import RayTaskError

    try:
        yield
    except Exception as error:
        cause = getattr(error, "cause", None) if isinstance(error, RayTaskError) else None
        told = cause if isinstance(cause, RolloutError | UserError) else error
        if is_lost_process(told):
            raise LostProcessError(_in_a_line(told)) from error
        if told is not error:
            raise told from None
        raise


class Reporter:
    """Tells a watchdog of an error; without an `actor` an error is its caller's alone."""

    def __init__(self, actor: Any = None) -> None:
        self._actor = actor

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Reports whatever is raised inside, and lets it through."""
        try:
            yield
        except Exception as error:
            if self._actor is not None:
                import ray

                text = str(error) if isinstance(error, RolloutError) else f"rollout: {error!r}"
                told = self._actor.report.remote(_in_a_line(text), is_lost_process(error))
                # Arrived before the error is anybody else's, who might end this process.
                ray.wait([told], timeout=REPORT_S)
            raise

    def watch_this_actor(self) -> None:
        """Has the death of the actor that this is called in reported."""
        if self._actor is not None:
            import ray

            context = ray.get_runtime_context()
            if context.get_actor_id() is not None:
                self._actor.watch.remote(context.current_actor)


def _error(text: str, lost: bool) -> RolloutError:
    return LostProcessError(text) if lost else RolloutError(text)


def _gone(error: Exception) -> LostProcessError:
    return LostProcessError(f"the process that rolls out is gone: {_in_a_line(error)}")


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
        from ray.exceptions import RayActorError

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
        import ray

        self._actor: Any = ray.remote(num_cpus=0)(_FirstFailure).remote()
        self._lock = threading.Lock()
        self._over = False
        self._failure: RolloutError | None = None
        self.reporter = Reporter(self._actor)

    def _watch(self) -> None:
        import ray
        from ray.exceptions import RayError

        try:
            first: Any = ray.get(self._actor.wait.remote())
        except RayError:  # the run is over, and the actor with it
            return
        with self._lock:
            if not self._over:
                self._failure = _error(*first)
                main = threading.main_thread().ident
                assert main is not None
                signal.pthread_kill(main, signal.SIGINT)

    def _reported_late(self, error: Exception) -> RolloutError | None:
        """What an actor has reported that an error of Ray's comes from; itself where it is gone."""
        import ray
        from ray.exceptions import RayActorError

        if isinstance(error, RayActorError):
            return _gone(error)
        done, _ = ray.wait([self._actor.wait.remote()], timeout=REPORT_S)
        return _error(*ray.get(done[0])) if done else None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """A SIGINT raises `KeyboardInterrupt` in the body where a failure is reported; without one
        it does what it did before."""
        import ray
        from ray.exceptions import RayError

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

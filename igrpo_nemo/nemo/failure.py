"""The error of a rollout: which problem, which stage; whether a process is gone; whom to tell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from igrpo_nemo.types import Problem

REPORT_S = 10.0
"""Seconds that a report may take to come."""


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
            reason = " ".join(str(error).split()) or type(error).__name__
            raise cls(f"problem {problem.id}, stage {stage}: {reason[:500]}") from error


class LostProcessError(RolloutError):
    """Ray lost a process of the run: with it a node, or memory; not a fault of what was asked.

    `exit_code` tells a launcher that starting again may help.
    """

    exit_code = 70


def is_lost_process(error: BaseException | None) -> bool:
    """Whether an actor, a node or what they held is gone, at the bottom of an error."""
    from ray.exceptions import (
        NodeDiedError,
        ObjectLostError,
        RayActorError,
        RayTaskError,
        WorkerCrashedError,
    )

    if error is None:
        return False
    if isinstance(error, RayActorError | NodeDiedError | ObjectLostError | WorkerCrashedError):
        return True
    # By name: a checker without Ray takes the class for `Unknown` and the error for no such thing.
    below = getattr(error, "cause", None) if isinstance(error, RayTaskError) else None
    return is_lost_process(below or error.__cause__)


@contextmanager
def lost_process_named() -> Iterator[None]:
    """Raises `LostProcessError` for whatever a lost process made of the body."""
    try:
        yield
    except Exception as error:
        if is_lost_process(error):
            raise LostProcessError(" ".join(str(error).split())[:1_000]) from error
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
                told = self._actor.report.remote(
                    " ".join(text.split())[:1_000], is_lost_process(error)
                )
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

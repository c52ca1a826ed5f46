"""The one error of a rollout: which problem, which stage, what happened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from igrpo_nemo.types import Problem


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


class RowError(RuntimeError):
    """A row of an engine's answer is unusable; `row` counts from 0."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(reason)
        self.row = row

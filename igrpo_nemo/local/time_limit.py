"""`checkpointing.checkpoint_must_save_by`: training ends itself while there is time to save."""

from __future__ import annotations

import time
from collections.abc import Callable


class TimeLimit:
    """Asked after every step, as NeMo-RL asks its `TimeoutChecker` (nemo_rl/utils/timer.py):
    a step of average length more must fit into `limit` (DD:HH:MM:SS), counted from here."""

    def __init__(self, limit: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = None if limit is None else _seconds(limit)
        self._clock = clock
        self._start = clock()
        self._steps = 0

    def reached(self) -> bool:
        """Call once at the end of each step: whether the next one would end too late."""
        self._steps += 1
        elapsed = self._clock() - self._start
        return self._seconds is not None and elapsed * (1 + 1 / self._steps) >= self._seconds


def _seconds(limit: str) -> int:
    days, hours, minutes, seconds = (int(part) for part in limit.split(":"))
    return 86400 * days + 3600 * hours + 60 * minutes + seconds

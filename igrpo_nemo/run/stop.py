"""The file whose existence asks a run to save and stop: how a job script reaches its driver.

    IGRPO_STOP_FILE=PATH igrpo train ...        later: touch PATH

A signal would hit every process of a Slurm step; both engines look at the file between steps.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

VARIABLE = "IGRPO_STOP_FILE"

_PERIOD_S = 1.0
"""Least seconds between two looks: the file may lie on a shared disk."""


class StopFile:
    """True once the file exists, and from then on; always false without a file."""

    def __init__(
        self, path: Path | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.path = path
        self._clock = clock
        self._looked: float | None = None
        self._seen = False

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ) -> StopFile:
        """The one that the environment names."""
        name = environ.get(VARIABLE)
        return cls(Path(name) if name else None)

    def __bool__(self) -> bool:
        if self.path is None or self._seen:
            return self._seen
        now = self._clock()
        if self._looked is None or now - self._looked >= _PERIOD_S:
            self._looked = now
            self._seen = os.path.exists(self.path)  # an unreachable disk is no request
        return self._seen

"""What stops a run early: it finishes what it is doing, saves, and exits with its own code.

    SIGINT | SIGTERM | SIGUSR1 -> flag; the embedded trainer looks at it between micro-batches, and
                                  between the steps of a warm-up, of which nothing is kept
    the stop file appears      -> likewise; NeMo-RL's trainers look at it between steps
    a second SIGINT            -> KeyboardInterrupt, at once
    the time limit             -> asked between steps

Slurm announces the end of a job with SIGUSR1 (`--signal`) and then SIGTERM: both are one request.
A signal would hit every process of a Slurm step, so that a job script names a file to its driver:

    IGRPO_STOP_FILE=PATH igrpo train ...        later: touch PATH
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Self

EXIT_INTERRUPTED = 75
"""Exit code of a run that stopped on request with its state saved (EX_TEMPFAIL: run it again)."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

VARIABLE = "IGRPO_STOP_FILE"

_PERIOD_S = 1.0
"""Least seconds between two looks: the file may lie on a shared disk."""


class StopRequested(Exception):
    """Something asked to stop, at a point where nothing of what is computed needs keeping."""


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


Handler = Callable[[int, FrameType | None], object]


@contextmanager
def handling(handlers: Mapping[signal.Signals, Handler]) -> Iterator[None]:
    """Signal handlers for as long as the block takes; main thread only."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: installed by native code, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _announce_on_stderr(line: str) -> None:
    # Not print(): a handler may run inside a print, whose buffer is not re-entrant.
    try:
        os.write(2, f"\n{line}\n".encode())
    except OSError:
        pass  # nobody is listening any more, which must not stop the save


class InterruptFlag:
    """Context manager that turns signals into `requested`; handlers are restored on leaving.

    Outside the main thread there are no signals, since Python delivers them there only. `announce`
    gets one line for the first request; it may run inside a signal handler.
    """

    def __init__(
        self,
        announce: Callable[[str], None] = _announce_on_stderr,
        stop_file: StopFile | None = None,
    ) -> None:
        self._requested = False
        self._stop_file = StopFile() if stop_file is None else stop_file
        self._announce = announce
        self._interrupts = 0
        self._owner = os.getpid()
        self._handlers = ExitStack()

    def __enter__(self) -> Self:
        self._owner = os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._handlers.enter_context(handling(dict.fromkeys(SIGNALS, self._handle)))
        return self

    def __exit__(self, *_: object) -> None:
        self._handlers.close()

    @property
    def requested(self) -> bool:
        """Whether to save and stop, by a signal or by the stop file."""
        if not self._requested and self._stop_file:
            self._requested = True
            self._announce(f"{self._stop_file.path}: finishing what is being computed, then saving")
        return self._requested

    def check(self) -> None:
        """Raises `StopRequested` where a stop is requested."""
        if self.requested:
            raise StopRequested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # A forked worker inherits the handler but trains nothing: it must stay killable,
            # or a pool that terminates its workers would wait for ever.
            self._handlers.close()
            os.kill(os.getpid(), number)
            return
        name = signal.Signals(number).name
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        if not self._requested:
            self._requested = True
            self._announce(
                f"{name}: finishing what is being computed, then saving; "
                "press again to stop at once"
            )


class TimeLimit:
    """`checkpointing.checkpoint_must_save_by`: training ends itself while there is time to save.

    Asked after every step, as NeMo-RL asks its `TimeoutChecker` (nemo_rl/utils/timer.py): a step
    of average length more must fit into `limit` (DD:HH:MM:SS), counted from here.
    """

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

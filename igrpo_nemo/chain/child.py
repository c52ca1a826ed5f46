"""A stage's command run to its own end: a request to stop is the child's to fulfil, not ours.

Ctrl-C          the terminal tells parent and child; the parent goes on waiting
SIGTERM, USR1   told to the parent alone; it passes them on and goes on waiting
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

Handler = Callable[[int, FrameType | None], object]


def run_to_its_end(
    command: Sequence[str], *, cwd: Path | None = None, environ: Mapping[str, str] | None = None
) -> int:
    """The exit code of a command, 128 + N where signal N ended it. It has as long as it takes to
    save what it has: `subprocess.run` would kill it a quarter of a second after Ctrl-C."""
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if child is None:
            early.append(number)
        else:
            child.send_signal(number)

    def wait_on(number: int, frame: FrameType | None) -> None:
        if child is None:
            # The terminal may not have reached a child yet; a second SIGINT would stop it unsaved.
            early.append(signal.SIGTERM)

    # Handlers, not SIG_IGN: a child inherits what is ignored, but not what is handled.
    handlers = {signal.SIGINT: wait_on, signal.SIGTERM: pass_on, signal.SIGUSR1: pass_on}
    with handling(handlers):
        child = subprocess.Popen(list(command), stdin=subprocess.DEVNULL, cwd=cwd, env=environ)
        for number in early:
            child.send_signal(number)
        code = child.wait()
    return code if code >= 0 else 128 - code


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

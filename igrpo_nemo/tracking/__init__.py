"""What a run tells: metric sinks, samples, and the console.

engine -> Tracker (JSONL in the run folder, TensorBoard, wandb, MLflow), console (terminal)
"""

from __future__ import annotations

import sys
from typing import TextIO

from igrpo_nemo.tracking.console import Console, PlainConsole
from igrpo_nemo.tracking.tracker import Tracker, open_tracker

__all__ = ["Console", "Tracker", "open_console", "open_tracker"]


def open_console(total_steps: int, stream: TextIO | None = None) -> Console:
    """The console that fits `stream` (standard output): rich on a terminal, else plain lines."""
    stream = stream or sys.stdout
    if stream is None:
        return Console()
    if stream.isatty():
        from rich.console import Console as Terminal

        terminal = Terminal(file=stream)
        if not terminal.is_dumb_terminal:
            from igrpo_nemo.tracking.live_console import RichConsole

            return RichConsole(total_steps, terminal)
    return PlainConsole(total_steps, stream)

"""The terminal's console: a bar for the run, one for the stage, sample tables above them.

stage -> second bar (rows done)     step -> first bar, metrics, ETA
samples, note -> printed above the bars, where they scroll
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from igrpo_nemo.files.display_text import printable, shorten
from igrpo_nemo.tracking.console import (
    SAMPLE_PARTS,
    SAMPLES_SHOWN,
    Console,
    Eta,
    describe,
    is_validation,
    verdict,
)

_FRAME = 0.25
"""Least seconds between two drawings of the bars: drawing costs time that training could use."""


class RichConsole(Console):
    """Live progress. Drawn from the caller's thread alone, so that no lock is held at a fork.

    Text of models enters as `rich.text.Text`, which has no markup, after `shorten`.
    """

    def __init__(
        self,
        total_steps: int,
        terminal: Terminal,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._terminal = terminal
        self._clock = clock
        self._eta = Eta(total_steps, clock)
        self._drawn = clock()
        self._total = total_steps
        self._silent = False
        self._progress = Progress(
            TextColumn("{task.description:<8}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}", markup=False),
            console=terminal,
            auto_refresh=False,
            transient=True,
        )
        self._run = self._progress.add_task("step", total=total_steps, told="")
        self._stage = self._progress.add_task("", total=None, told="", visible=False)
        self._guard(self._progress.start)

    def stage(self, name: str, done: int, total: int) -> None:
        self._progress.update(
            self._stage, description=printable(name), completed=done, total=total, visible=True
        )
        if self._clock() - self._drawn >= _FRAME:
            self._draw()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        told = describe(metrics)
        if is_validation(metrics):
            self.note(f"step {step}/{self._total}  " + "  ".join(told))
            return
        told.append(f"ETA {self._eta.after(step)}")
        self._progress.update(self._run, completed=step, told="  ".join(told))
        self._progress.update(self._stage, visible=False)
        self._draw()

    def samples(
        self, step: int, rows: Sequence[Mapping[str, object]], limit: int = SAMPLES_SHOWN
    ) -> None:
        table = Table(title=f"samples of step {step}", title_justify="left", show_lines=True)
        parts = [p for p in SAMPLE_PARTS if any(row.get(p) is not None for row in rows)]
        for heading in ("question", *parts):
            table.add_column(heading, ratio=1, overflow="fold")
        for row in rows[:limit]:
            question = shorten(str(row.get("question", "")), 240)
            answer = shorten(str(row.get("answer", "")), 80)
            cells = [Text(f"{question}\nanswer: {answer}")]
            for part in parts:
                shown = shorten(str(row.get(part) or ""), 240)
                style = "green" if row.get(f"{part}_correct") else "red"
                cells.append(Text(f"{shown}\n").append(verdict(row, part), style=style))
            table.add_row(*cells)
        self._guard(lambda: self._terminal.print(table))

    def note(self, text: str) -> None:
        self._guard(lambda: self._terminal.print(Text(printable(text))))

    def close(self) -> None:
        self._guard(self._progress.stop)

    def _draw(self) -> None:
        self._drawn = self._clock()
        self._guard(self._progress.refresh)

    def _guard(self, draw: Callable[[], None]) -> None:
        if self._silent:
            return
        try:
            draw()
        except (OSError, ValueError):  # the terminal is gone: the run goes on without it
            self._silent = True

"""Progress for people: one plain line a step, and a few samples, on a terminal or in a log.

    trainer -> stage / step / samples / note -> lines of the stream

A console never ends a run: when its reader is gone it falls silent.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from igrpo_nemo.files.display_text import clock, printable, shorten

SAMPLES_SHOWN = 3
SAMPLE_PARTS = ("draft", "refinement", "response")
"""The texts of a sample row; `response` is a validation's answer to the bare prompt."""
_SILENCE = 30.0
"""Seconds after which the console says which stage is running."""
_SMOOTHING = 0.2
"""Weight of the newest step in the running mean of step times that the ETA is made from."""

_SHOWN = (
    ("igrpo/draft_reward", "draft reward", "{:.2f}"),
    ("igrpo/refinement_reward", "refinement reward", "{:.2f}"),
    ("entropy/exact", "entropy", "{:.2f}"),
    ("perf/tokens_per_s", "tokens/s", "{:,.0f}"),
    ("val/accuracy", "val accuracy", "{:.1%}"),
)


class Console:
    """Lines on `stream` (standard output). `total_steps` counts from the start of training."""

    def __init__(
        self,
        total_steps: int,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream or sys.stdout
        self._now = now
        self._total = total_steps
        self._last_line = self._last_step = now()
        self._seconds: float | None = None

    def stage(self, name: str, done: int, total: int) -> None:
        """`done` of `total` rows of a stage (draft, refine, train, val, ...) are finished: said
        where nothing else was for half a minute."""
        if self._now() - self._last_line >= _SILENCE:
            self._line(f"  {name} {done}/{total}")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step, or a validation (all names start with `val/`), is finished."""
        parts = [f"step {step:>{len(str(self._total))}}/{self._total}"]
        parts += [f"{label} {form.format(metrics[n])}" for n, label, form in _SHOWN if n in metrics]
        if not metrics or not all(name.startswith("val/") for name in metrics):
            parts.append(f"ETA {clock(self._seconds_left(step))}")
        self._line("  ".join(parts))

    def samples(
        self, step: int, rows: Sequence[Mapping[str, object]], limit: int = SAMPLES_SHOWN
    ) -> None:
        """A few rows of samples.jsonl, or of a validation."""
        for row in rows[:limit]:
            question, answer = _text(row, "question", 200), _text(row, "answer", 60)
            self._line(f"sample of step {step}: {question}  [answer {answer}]")
            for part in SAMPLE_PARTS:
                if row.get(part) is not None:
                    self._line(f"  {part} ({_verdict(row, part)}): {_text(row, part, 200)}")

    def note(self, text: str) -> None:
        self._line(printable(text))

    def _seconds_left(self, step: int) -> float:
        """From a running mean over the recent steps of this process; once a step."""
        now = self._now()
        taken, self._last_step = now - self._last_step, now
        if self._seconds is None:
            self._seconds = taken
        self._seconds += _SMOOTHING * (taken - self._seconds)
        return self._seconds * max(0, self._total - step)

    def _line(self, text: str) -> None:
        self._last_line = self._now()
        if self._stream is None:  # a process without standard output
            return
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # a closed pipe or stream: the run goes on without us
            self._stream = None


def _verdict(row: Mapping[str, object], part: str) -> str:
    reward, correct = row.get(f"{part}_reward"), row.get(f"{part}_correct")
    told = f"reward {reward:.2f}" if isinstance(reward, (int, float)) else "no reward"
    return told if correct is None else f"{told}, {'correct' if correct else 'wrong'}"


def _text(row: Mapping[str, object], name: str, characters: int) -> str:
    return shorten(str(row.get(name, "")), characters)

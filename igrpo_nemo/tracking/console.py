"""Progress for people: live on a terminal, one plain line per step elsewhere.

    trainer -> stage / step / samples / note -> RichConsole | PlainConsole | Console (quiet)

A console never ends a run: when its reader is gone it falls silent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Self, TextIO

from igrpo_nemo.files.display_text import printable, shorten

SAMPLES_SHOWN = 3
SAMPLE_PARTS = ("draft", "refinement", "response")
"""The texts of a sample row; `response` is a validation's answer to the bare prompt."""
_SILENCE = 30.0
"""Seconds after which a plain console says which stage is running."""
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
    """What an engine tells; this one says nothing."""

    def stage(self, name: str, done: int, total: int) -> None:
        """`done` of `total` rows of a stage (draft, refine, train, val, ...) are finished."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step, or a validation (all names start with `val/`), is finished."""

    def samples(
        self, step: int, rows: Sequence[Mapping[str, object]], limit: int = SAMPLES_SHOWN
    ) -> None:
        """Show a few rows of samples.jsonl, or of a validation."""

    def note(self, text: str) -> None:
        """A line of the program's own."""

    def close(self) -> None:
        """The last line is said."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PlainConsole(Console):
    """Lines for logs and pipes; a long stage is mentioned every half minute.

    `total_steps` counts from the start of training, not from the step of a resume.
    """

    def __init__(
        self, total_steps: int, stream: TextIO, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self._clock = clock
        self._eta = Eta(total_steps, clock)
        self._total = total_steps
        self._last_line = clock()

    def stage(self, name: str, done: int, total: int) -> None:
        if self._clock() - self._last_line >= _SILENCE:
            self._line(f"  {name} {done}/{total}")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        parts = [f"step {step:>{len(str(self._total))}}/{self._total}", *describe(metrics)]
        if not is_validation(metrics):
            parts.append(f"ETA {self._eta.after(step)}")
        self._line("  ".join(parts))

    def samples(
        self, step: int, rows: Sequence[Mapping[str, object]], limit: int = SAMPLES_SHOWN
    ) -> None:
        for row in rows[:limit]:
            question, answer = _text(row, "question", 200), _text(row, "answer", 60)
            self._line(f"sample of step {step}: {question}  [answer {answer}]")
            for part in SAMPLE_PARTS:
                if row.get(part) is not None:
                    self._line(f"  {part} ({verdict(row, part)}): {_text(row, part, 200)}")

    def note(self, text: str) -> None:
        self._line(printable(text))

    def _line(self, text: str) -> None:
        self._last_line = self._clock()
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # a closed pipe or stream: the run goes on without us
            self._line = lambda text: None


class Eta:
    """Time left, from a running mean over the recent steps of this process."""

    def __init__(self, total_steps: int, clock: Callable[[], float]) -> None:
        self._total = total_steps
        self._clock = clock
        self._last = clock()
        self._seconds: float | None = None

    def after(self, step: int) -> str:
        """Call once at the end of each step; `h:mm:ss`."""
        now = self._clock()
        taken, self._last = now - self._last, now
        if self._seconds is None:
            self._seconds = taken
        self._seconds += _SMOOTHING * (taken - self._seconds)
        left = round(self._seconds * max(0, self._total - step))
        return f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"


def is_validation(metrics: Mapping[str, float]) -> bool:
    return bool(metrics) and all(name.startswith("val/") for name in metrics)


def describe(metrics: Mapping[str, float]) -> list[str]:
    """The few metrics shown while training, those that are there, as `name value`."""
    return [f"{label} {form.format(metrics[n])}" for n, label, form in _SHOWN if n in metrics]


def verdict(row: Mapping[str, object], part: str) -> str:
    """`reward 2.00, correct` of one of a row's `SAMPLE_PARTS`."""
    reward, correct = row.get(f"{part}_reward"), row.get(f"{part}_correct")
    told = f"reward {reward:.2f}" if isinstance(reward, (int, float)) else "no reward"
    return told if correct is None else f"{told}, {'correct' if correct else 'wrong'}"


def _text(row: Mapping[str, object], name: str, characters: int) -> str:
    return shorten(str(row.get(name, "")), characters)

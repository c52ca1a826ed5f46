"""One call logs to every sink; a console tells people.

    engine -> Tracker.log / log_samples -> JSONL, TensorBoard, and wandb or MLflow when asked for
    rollouts -> sample_rows -> rows of samples.jsonl and of the sample table
    engine -> Console.stage / step / samples / note -> plain lines, on a terminal or in a log

JSONL is the record: its errors end the run. A remote sink is a network away: its errors do not. A
console never ends a run: when its reader is gone it falls silent.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TextIO

from igrpo_nemo.files.display_text import clock, printable, shorten
from igrpo_nemo.files.scrub import plain_config, scrub
from igrpo_nemo.run.folder import RunFolder
from igrpo_nemo.tracking import services
from igrpo_nemo.types import Group, Problem, Rollout

_FAILURES_ALLOWED = 3


class Sink(Protocol):
    """Where metrics go. `remote` says that its failures are the network's, not the run's."""

    remote: bool

    def log(self, kind: str, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """metrics.jsonl and samples.jsonl, through the run folder, which its owner closes."""

    remote = False

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def log(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        self._folder.append_metrics(kind, step, time.time(), metrics)

    def log_samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        for row in rows:
            self._folder.append_sample(step, row)

    def close(self) -> None:
        pass


class Tracker:
    """Sends metrics (`kind` is `train` or `val`) and samples to all its sinks; a context manager.

    A remote sink that fails three times in a row is dropped with a warning.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)
        self._failures = {id(sink): 0 for sink in self._sinks}

    def log(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        self._each(lambda sink: sink.log(kind, step, metrics))

    def log_samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        self._each(lambda sink: sink.log_samples(step, rows))

    def close(self) -> None:
        self._each(lambda sink: sink.close())
        self._sinks = []

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            if not sink.remote:
                call(sink)
                continue
            try:
                call(sink)
                self._failures[id(sink)] = 0
            except Exception as error:  # the boundary to other people's services
                self._failures[id(sink)] += 1
                self._forgive(sink, error)

    def _forgive(self, sink: Sink, error: Exception) -> None:
        name = type(sink).__name__
        reason = f"{type(error).__name__}: {error}"
        if self._failures[id(sink)] >= _FAILURES_ALLOWED:
            self._sinks.remove(sink)
            reason += "; it gets no more records, the run folder has them all"
        warnings.warn(f"{name} failed: {scrub(reason)}", stacklevel=4)


def open_tracker(
    folder: RunFolder, logger: object, config: object, resume_step: int | None = None
) -> Tracker:
    """The sinks that the `logger` section asks for, on `folder`.

    `config` is the whole configuration for the services that show it; it is scrubbed first. With
    `resume_step` the sinks continue the run from there; the caller truncates `folder` itself.
    Raises UserError when a requested extra is missing or a service refuses.
    """
    section = plain_config(logger)
    assert isinstance(section, dict)
    sinks: list[Sink] = [JsonlSink(folder)]
    if section.get("tensorboard_enabled", True):
        sinks.append(services.TensorBoardSink(folder.tensorboard_dir, resume_step))
    for name, kind in (("wandb", services.WandbSink), ("mlflow", services.MlflowSink)):
        if section.get(f"{name}_enabled"):
            sinks.append(kind(folder.path, section.get(name) or {}, scrub(config), resume_step))
    return Tracker(sinks)


def sample_rows(rollouts: Sequence[Rollout], limit: int = 8) -> list[dict[str, Any]]:
    """The first `limit` rollouts as flat records; refinement fields are null without Stage 2.

    The draft is the one that was selected; where none was shown it is the group's first.
    """
    rows = []
    for rollout in rollouts[:limit]:
        shown = None if rollout.selection is None else rollout.selection.index
        row = {**_asked(rollout.problem), **_part("draft", rollout.drafts, shown or 0)}
        refined = rollout.refinements[0] if rollout.refinements else None
        rows.append({**row, "draft_shown": shown is not None, **_part("refinement", refined)})
    return rows


def response_rows(answers: Sequence[Group], limit: int) -> list[dict[str, Any]]:
    """The first `limit` problems of a validation, each with its first answer."""
    return [{**_asked(group.problem), **_part("response", group)} for group in answers[:limit]]


def _asked(problem: Problem) -> dict[str, Any]:
    return {"problem_id": problem.id, "question": problem.question, "answer": problem.answer}


def _part(name: str, group: Group | None, index: int = 0) -> dict[str, Any]:
    if group is None:
        return dict.fromkeys((name, f"{name}_reward", f"{name}_correct"))
    score = group.scores[index]
    told = {f"{name}_reward": score.reward, f"{name}_correct": score.correct}
    return {name: group.completions[index].text, **told}


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

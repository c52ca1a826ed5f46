"""One call logs to every sink.

    engine -> Tracker.log / log_samples -> JSONL, TensorBoard, and wandb or MLflow when asked for
    rollouts -> sample_rows -> rows of samples.jsonl and of the sample table

JSONL is the record: its errors end the run. A remote sink is a network away: its errors do not.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

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

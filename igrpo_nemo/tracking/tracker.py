"""One call logs to every sink.

    engine -> Tracker.log / log_samples -> JSONL, TensorBoard, and wandb or MLflow when asked for
    rollouts -> sample_rows -> rows of samples.jsonl and of the sample table

JSONL is the record: its errors end the run. A remote sink is a network away: its errors do not.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from igrpo_nemo.files.scrub import plain_config, scrub
from igrpo_nemo.run.folder import RunFolder
from igrpo_nemo.types import Group, Rollout

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


class TensorBoardSink:
    """Scalars in `folder`, under their own names, flushed with every step.

    What an earlier run logged there after `resume_step` is purged, and all of it where there is no
    step to resume from. Samples are not written here: samples.jsonl and the report show them.
    """

    remote = False

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        purge_step = 0 if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(log_dir=str(folder), purge_step=purge_step)

    def log(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()

    def log_samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        pass

    def close(self) -> None:
        self._writer.close()


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
        sinks.append(TensorBoardSink(folder.tensorboard_dir, resume_step))
    for name in ("wandb", "mlflow"):
        if section.get(f"{name}_enabled"):
            from igrpo_nemo.tracking.services import MlflowSink, WandbSink

            kind = WandbSink if name == "wandb" else MlflowSink
            sinks.append(kind(folder.path, section.get(name) or {}, scrub(config), resume_step))
    return Tracker(sinks)


def sample_rows(rollouts: Sequence[Rollout], limit: int = 8) -> list[dict[str, object]]:
    """The first `limit` rollouts as flat records; refinement fields are null without Stage 2.

    The draft is the one that was selected; where none was shown it is the group's first.
    """
    rows = []
    for rollout in rollouts[:limit]:
        selection = rollout.selection
        shown = selection is not None and selection.index is not None
        index = selection.index if selection is not None and selection.index is not None else 0
        draft, draft_score = rollout.drafts.completions[index], rollout.drafts.scores[index]
        row: dict[str, object] = {
            "problem_id": rollout.problem.id,
            "question": rollout.problem.question,
            "answer": rollout.problem.answer,
            "draft": draft.text,
            "draft_shown": shown,
            "draft_reward": draft_score.reward,
            "draft_correct": draft_score.correct,
            "refinement": None,
            "refinement_reward": None,
            "refinement_correct": None,
        }
        if rollout.refinements:
            refined = rollout.refinements[0]
            row["refinement"] = refined.completions[0].text
            row["refinement_reward"] = refined.scores[0].reward
            row["refinement_correct"] = refined.scores[0].correct
        rows.append(row)
    return rows


def response_rows(answers: Sequence[Group], limit: int) -> list[dict[str, object]]:
    """The first `limit` problems of a validation, each with its first answer."""
    return [
        {
            "problem_id": group.problem.id,
            "question": group.problem.question,
            "answer": group.problem.answer,
            "response": group.completions[0].text,
            "response_reward": group.scores[0].reward,
            "response_correct": group.scores[0].correct,
        }
        for group in answers[:limit]
    ]

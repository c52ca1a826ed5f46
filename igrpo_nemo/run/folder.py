"""The run folder: what a run leaves on disk, written by one process at a time.

config.yaml      the resolved configuration, scrubbed     (atomic)
metrics.jsonl    {"kind", "step", "time", "metrics"}      (appended a whole line at a time)
samples.jsonl    {"step", "problem_id", "question", ...}  (likewise)
plan.json        {"total_steps"}                          (atomic)
inputs.json      fingerprints of data and base model      (atomic, identity)
summary.json     the run's result                         (atomic)
finished         there when the last step is done: its number
.lock            held while a process writes here         (lock)
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from igrpo_nemo.config.compose import written_values
from igrpo_nemo.errors import UserError
from igrpo_nemo.files.atomic import is_disk_full, write_or_refuse
from igrpo_nemo.files.scrub import scrub
from igrpo_nemo.run.lock import RunLock

FINISHED = "finished"
"""The marker of a run whose last step is done. A run without it is to be resumed."""
PLAN = "plan.json"
CONFIG = "config.yaml"


def stored_config(run: Path) -> dict[str, Any]:
    """The values of a run's config.yaml as they stand there, empty where there is none.

    Raises `UserError` for a file that holds no config.
    """
    path = run / CONFIG
    return written_values(path) if path.is_file() else {}


class RunFolder:
    """Creates `log_dir` and holds it until `close()`; also a context manager.

    Raises UserError if another run writes there (naming its process), or if it cannot be written.
    """

    def __init__(self, log_dir: str | Path) -> None:
        self.path = Path(log_dir)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(self.path)
        except OSError as error:
            raise UserError(
                f"cannot write to logger.log_dir {log_dir}: {error.strerror}"
            ) from error
        self._metrics = _LineFile(self.path / "metrics.jsonl")
        self._samples = _LineFile(self.path / "samples.jsonl")

    @property
    def tensorboard_dir(self) -> Path:
        return self.path / "tensorboard"

    def write_config(self, config: object) -> None:
        """Write config.yaml from a mapping, an OmegaConf node or a pydantic model, scrubbed."""
        text = yaml.safe_dump(scrub(config), sort_keys=False, allow_unicode=True)
        self._replace(CONFIG, text.encode())

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Write summary.json; a non-finite number becomes null."""
        text = json.dumps(_json_ready(dict(summary)), indent=2, allow_nan=False)
        self._replace("summary.json", f"{text}\n".encode())

    def write_plan(self, total_steps: int) -> None:
        """Write plan.json: how long the run is to be, which only the loaded data tells."""
        self._replace(PLAN, f"{json.dumps({'total_steps': total_steps})}\n".encode())

    def mark_finished(self, steps: int) -> None:
        """The last step, number `steps`, is done: a job that comes later has nothing to do."""
        self._replace(FINISHED, f"{steps}\n".encode())

    def unmark_finished(self) -> None:
        """The run goes on, for more steps than before."""
        (self.path / FINISHED).unlink(missing_ok=True)

    def append_metrics(
        self, kind: str, step: int, time: float, metrics: Mapping[str, float]
    ) -> None:
        """Append one record. Non-finite values stand as text under "non_finite", so that every
        line is strict JSON and every value under "metrics" is a number."""
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        record: dict[str, object] = {"kind": kind, "step": step, "time": time, "metrics": finite}
        if len(finite) < len(values):
            record["non_finite"] = {n: str(v) for n, v in values.items() if n not in finite}
        self._metrics.append(record)

    def append_sample(self, step: int, row: Mapping[str, object]) -> None:
        self._samples.append({"step": step, **row})

    def truncate_after(self, step: int) -> None:
        """Drop the records of later steps, which a run resumed at `step` will log again.

        -1 drops everything, for a run that starts anew. A torn line goes too.
        """
        self._metrics.truncate_after(step)
        self._samples.truncate_after(step)

    def close(self) -> None:
        """Close the files and let the next run in. Harmless when repeated."""
        self._metrics.close()
        self._samples.close()
        self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _replace(self, name: str, data: bytes) -> None:
        write_or_refuse(self.path / name, data)


class _LineFile:
    """A JSONL file whose every line is whole: a reader or a crash never meets half of one but last.

    The torn last line of a killed run is cut off on opening.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()
        self._cut_torn_line()

    def append(self, record: Mapping[str, object]) -> None:
        """One write per line. On a full disk the line is undone and UserError names the file."""
        # ASCII escapes: text from models may hold lone surrogates and Unicode line separators.
        line = json.dumps(_json_ready(record), allow_nan=False).encode("ascii") + b"\n"
        start = os.fstat(self._descriptor).st_size
        written = 0
        try:
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError as error:
            os.ftruncate(self._descriptor, start)
            what = "no space left" if is_disk_full(error) else error.strerror
            raise UserError(f"cannot write {self.path}: {what}") from error

    def truncate_after(self, step: int) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True)
        steps = [_step_of(line) for line in lines]
        kept = [line for line, at in zip(lines, steps, strict=True) if at <= step]
        if damaged := steps.count(math.inf):
            warnings.warn(f"{self.path}: {damaged} damaged lines are left out", stacklevel=2)
        if len(kept) < len(lines):
            self.close()
            try:
                write_or_refuse(self.path, b"".join(kept))
            finally:
                self._open()

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        try:
            self._descriptor = os.open(self.path, flags, 0o644)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error

    def _cut_torn_line(self) -> None:
        end = size = os.fstat(self._descriptor).st_size
        while end > 0:
            start = max(0, end - 65536)
            newline = os.pread(self._descriptor, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            os.ftruncate(self._descriptor, end)


def _step_of(line: bytes) -> float:
    """The step of a record; infinity for a line that is none, which is thereby dropped."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def _json_ready(value: object) -> object:
    """Non-finite numbers as null, scalars of numpy and torch as Python's, paths as text."""
    if isinstance(value, Mapping):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if not isinstance(value, float) and callable(item := getattr(value, "item", None)):
        return _json_ready(item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)

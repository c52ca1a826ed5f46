"""Checkpoints of the embedded engine: atomic, checksummed, and never the only copy at risk.

    save:    .saving_step_00000010/ with model/ optimizer.pt state.json metrics.json, manifest.json
             last -> all fsynced -> renamed to step_00000010/ -> what is not kept is removed
    latest:  newest step_* whose manifest and checksums hold; a damaged one is named and passed over

There is one writer at a time (the run folder's lock sees to it) and any number of readers.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from igrpo_nemo.errors import UserError
from igrpo_nemo.files.atomic import fsync_folder, is_disk_full
from igrpo_nemo.local.checkpoint_manifest import find_damage, seal, structural_damage

MODEL = "model"
TENSORS = "optimizer.pt"
STATE = "state.json"
METRICS = "metrics.json"

_FORMAT = 1
_STEP = re.compile(r"step_(\d+)")
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_SAVING, _REPLACED, _REMOVING = ".saving_", ".replaced_", ".removing_"


class CheckpointWarning(UserWarning):
    """A checkpoint on disk cannot be used; the message names it and what is used instead."""


@dataclass(frozen=True)
class TrainerState:
    """Where training stands, beside weights and optimizer.

    `index` is the position in the epoch's shuffled problems, `consumed_problems` the count over all
    epochs; `extra` holds whatever else the trainer needs and must survive JSON unchanged.
    """

    step: int
    epoch: int = 0
    index: int = 0
    consumed_problems: int = 0
    extra: dict = field(default_factory=dict)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A verified checkpoint; `tensors` are on the CPU, the model is loaded from `model_path`."""

    path: Path
    state: TrainerState
    tensors: dict[str, object]
    metrics: dict[str, float]
    model_path: Path


@dataclass
class CheckpointStore:
    """The checkpoints of one run; the fields are NeMo-RL's `checkpointing.*`.

    `metric_name` is `val:<name>` or `train:<name>` (NeMo-RL's spelling) or a name as it stands in
    the metrics (`val/accuracy`). The `keep_top_k` best are kept, and the newest always besides;
    without a metric the best are the newest, and None keeps all.
    """

    checkpoint_dir: Path
    metric_name: str | None = None
    higher_is_better: bool = True
    keep_top_k: int | None = None
    save_period: int | None = None
    _verified: set[Path] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        self.checkpoint_dir = Path(self.checkpoint_dir)
        if self.keep_top_k is not None and self.keep_top_k < 0:
            raise UserError(
                f"checkpointing.keep_top_k is {self.keep_top_k}: use 0 or more, or null"
            )
        if self.save_period is not None and self.save_period < 1:
            raise UserError(f"checkpointing.save_period is {self.save_period}: use 1 or more")

    def due(self, step: int) -> bool:
        """Whether `save_period` asks for a checkpoint after this step (steps count from 1)."""
        return self.save_period is not None and step > 0 and step % self.save_period == 0

    def save(
        self,
        step: int,
        *,
        write_model: Callable[[Path], None],
        tensors: Mapping[str, object],
        state: TrainerState,
        metrics: Mapping[str, float],
    ) -> Path:
        """Write the checkpoint of `step` and return its folder; then remove what is not kept.

        `write_model` fills an existing empty folder in Hugging Face format. `tensors` (optimizer,
        scheduler and generator states) must load with `weights_only=True`, which is checked here
        rather than at the resume. Non-finite metrics are left out: they rank nothing.

        Raises UserError if the disk is full or the folder cannot be written; earlier checkpoints
        are then untouched and nothing partial remains. Whatever else `write_model` raises passes.
        """
        if state.step != step:
            raise ValueError(f"checkpoint of step {step} was given the state of step {state.step}")
        name = f"step_{step:08d}"
        temporary = self.checkpoint_dir / f"{_SAVING}{name}"
        try:
            self._clean_leftovers()
            (temporary / MODEL).mkdir(parents=True)
            write_model(temporary / MODEL)
            _write_tensors(temporary / TENSORS, tensors)
            _write_json(temporary / STATE, {"format": _FORMAT, **dataclasses.asdict(state)})
            _write_json(temporary / METRICS, _finite(metrics))
            if not any(path.is_file() for path in (temporary / MODEL).rglob("*")):
                raise ValueError("write_model wrote nothing")
            seal(temporary)
            final = self._publish(temporary, name)
        except BaseException as error:
            reason = self._save_failure(error, step, temporary, tensors)
            shutil.rmtree(temporary, ignore_errors=True)
            if reason is not None:
                raise UserError(reason) from error
            raise
        self._verified.add(final)
        self.prune(keep=final)
        return final

    def latest(self) -> Path | None:
        """The newest intact checkpoint, or None.

        Every file is checked against the manifest; a damaged checkpoint is named in a
        CheckpointWarning with the file at fault, and the one before it is tried.
        """
        return self._first_intact(self._candidates())

    def best(self) -> Path | None:
        """The intact checkpoint with the best metric (the newest of equals), or None.

        Without a metric, or when no checkpoint has it, the newest.
        """
        ranked = self._ranked()
        return self._first_intact(
            [path for path in ranked if self._metric(path) is not None] or ranked
        )

    def load(self, path: str | Path) -> LoadedCheckpoint:
        """Read one checkpoint after checking it. Raises UserError naming the damaged file."""
        path = Path(path)
        if not path.is_dir():
            raise UserError(
                f"no checkpoint at {path}: give a step_* folder of {self.checkpoint_dir}"
            )
        if path not in self._verified and (damage := find_damage(path)):
            raise UserError(f"checkpoint {path} is damaged: {damage}; use an earlier one")
        state = json.loads((path / STATE).read_bytes())
        if (version := state.pop("format")) != _FORMAT:
            raise UserError(f"checkpoint {path} has format {version}; this version reads {_FORMAT}")
        state.pop("best_metric", None)  # Format 1 may hold it, always null.
        return LoadedCheckpoint(
            path=path,
            state=TrainerState(**state),
            tensors=torch.load(path / TENSORS, map_location="cpu", weights_only=True),
            metrics=json.loads((path / METRICS).read_bytes()),
            model_path=path / MODEL,
        )

    def prune(self, keep: Path | None = None) -> None:
        """Remove all but the `keep_top_k` best and the newest (or `keep`, when given)."""
        if self.keep_top_k is None:
            return
        whole = [path for path in self._candidates() if not structural_damage(path)]
        newest = keep or (whole[0] if whole else None)
        top = [path for path in self._ranked() if path in whole][: self.keep_top_k]
        for path in self._candidates():
            if path != newest and path not in top:
                self._remove(path)

    def discard_after(self, step: int) -> None:
        """Remove the checkpoints beyond `step`: a run that resumes from there will write its own.

        Without it, a damaged or a deliberately passed-over later checkpoint would stay in line as
        the newest of a history that no longer exists.
        """
        for path in self._candidates():
            if _step_of(path) > step:
                self._remove(path)

    def _candidates(self) -> list[Path]:
        """All published checkpoints, newest first.

        One that was being replaced by a second save of its step when the process died counts
        while its successor does not exist.
        """
        if not self.checkpoint_dir.is_dir():
            return []
        found = {
            entry.name: entry for entry in self.checkpoint_dir.iterdir() if _step_of(entry) >= 0
        }
        published = [
            path
            for name, path in found.items()
            if not name.startswith(_REPLACED) or name.removeprefix(_REPLACED) not in found
        ]
        return sorted(published, key=_step_of, reverse=True)

    def _ranked(self) -> list[Path]:
        """Best first; checkpoints without the metric come last, newest first."""
        sign = 1.0 if self.higher_is_better else -1.0

        def rank(path: Path) -> tuple[float, int]:
            value = self._metric(path)
            return (-math.inf if value is None else sign * value, _step_of(path))

        return sorted(self._candidates(), key=rank, reverse=True)

    def _metric(self, path: Path) -> float | None:
        if self.metric_name is None:
            return None
        try:
            metrics = json.loads((path / METRICS).read_bytes())
        except (OSError, ValueError):
            return None  # damaged: it ranks last, and `_first_intact` names it
        name = self.metric_name
        for key in (name, name.replace(":", "/", 1), name.partition(":")[2]):
            if key in metrics:
                return metrics[key]
        return None

    def _first_intact(self, paths: list[Path]) -> Path | None:
        for position, path in enumerate(paths):
            damage = find_damage(path)
            if damage is None:
                self._verified.add(path)
                return path
            following = paths[position + 1 : position + 2]
            instead = f"trying {following[0].name}" if following else "there is no other one"
            message = f"checkpoint {path} is damaged and is not used: {damage}; {instead}"
            warnings.warn(message, CheckpointWarning, stacklevel=3)
        return None

    def _publish(self, temporary: Path, name: str) -> Path:
        final = self.checkpoint_dir / name
        replaced = self.checkpoint_dir / f"{_REPLACED}{name}"
        if final.exists():
            # A folder cannot be renamed over a full one: the old one steps aside first, and
            # counts as this step's checkpoint until the new one has its name.
            os.rename(final, replaced)
        os.rename(temporary, final)
        fsync_folder(self.checkpoint_dir)
        if replaced.exists():
            self._remove(replaced)
        return final

    def _clean_leftovers(self) -> None:
        """Remove what a killed save or removal left behind; bring back an orphaned `replaced`."""
        self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        for entry in list(self.checkpoint_dir.iterdir()):
            original = self.checkpoint_dir / entry.name.removeprefix(_REPLACED)
            if entry.name.startswith((_SAVING, _REMOVING)):
                shutil.rmtree(entry)
            elif entry != original and original.exists():
                self._remove(entry)
            elif entry != original:
                os.rename(entry, original)

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint so that a crash half-way never leaves a torn one under its name."""
        self._verified.discard(path)
        doomed = path.with_name(f"{_REMOVING}{path.name.lstrip('.')}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _save_failure(
        self, error: BaseException, step: int, temporary: Path, tensors: Mapping[str, object]
    ) -> str | None:
        """The line for the user, or None if the failure is not the disk's.

        Called while the partial folder still exists: a native writer may lose the errno, and then
        only the full disk itself tells.
        """
        where = f"the checkpoint of step {step} in {self.checkpoint_dir}"
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            return f"cannot write {where}: {error.strerror}; set checkpointing.checkpoint_dir"
        if not self.checkpoint_dir.is_dir() or not isinstance(error, Exception):
            return None
        partial = _folder_bytes(temporary)
        free = shutil.disk_usage(self.checkpoint_dir).free
        native_writer = isinstance(error, (OSError, RuntimeError)) and free < 64 * 1024
        if not is_disk_full(error) and not native_writer:
            return None
        optimizer = temporary / TENSORS
        written = optimizer.stat().st_size if optimizer.exists() else 0
        unwritten = max(0, _tensor_bytes(tensors) - written)
        previous = max((_folder_bytes(path) for path in self._candidates()[:1]), default=0)
        return (
            f"no space left for {where}: it needs at least "
            f"{_megabytes(max(previous, partial + unwritten))}, {_megabytes(free + partial)} are "
            "free; earlier checkpoints are untouched. Free some space, lower "
            "checkpointing.keep_top_k, or set checkpointing.checkpoint_dir to another disk"
        )


def capture_rng() -> dict[str, object]:
    """States of the global generators (Python, numpy, torch, every CUDA device).

    Plain numbers and tensors only, so that they load with `weights_only=True`.
    """
    name, words, *rest = np.random.get_state()
    states: dict[str, object] = {
        "python": random.getstate(),
        "numpy": (name, np.asarray(words).tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_rng(states: Mapping[str, object]) -> None:
    """Undo `capture_rng`. CUDA states are restored only where as many devices are present."""
    version, words, gauss = states["python"]  # type: ignore[misc]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(states["numpy"])  # type: ignore[arg-type]
    torch.set_rng_state(states["torch"])  # type: ignore[arg-type]
    cuda = states.get("cuda")
    if isinstance(cuda, list) and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)


def _step_of(path: Path) -> int:
    match = _STEP.fullmatch(path.name.removeprefix(_REPLACED))
    return int(match[1]) if match else -1


def _write_tensors(path: Path, tensors: Mapping[str, object]) -> None:
    # Through a Python file object: torch's own file writer loses the errno of a full disk.
    with open(path, "wb") as file:
        torch.save(dict(tensors), file)
    torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _tensor_bytes(content: object) -> int:
    if isinstance(content, torch.Tensor):
        return content.nbytes
    if isinstance(content, Mapping):
        return sum(_tensor_bytes(value) for value in content.values())
    if isinstance(content, (list, tuple)):
        return sum(_tensor_bytes(value) for value in content)
    return 0


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"

"""Checkpoints of the embedded engine: atomic, checksummed, and never the only copy at risk.

    save:    .saving_step_00000010/ with model/ optimizer.pt state.json metrics.json, manifest.json
             last -> all fsynced -> renamed to step_00000010/ -> what is not kept is removed
    latest:  newest step_* whose manifest and checksums hold; a damaged one is named and passed over

There is one writer at a time (the run folder's lock sees to it) and any number of readers.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import random
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from igrpo_nemo.config.nemo_keys import Checkpointing
from igrpo_nemo.errors import UserError
from igrpo_nemo.files.atomic import fsync_file, fsync_folder, is_disk_full

MODEL, TENSORS = "model", "optimizer.pt"
STATE, METRICS, MANIFEST = "state.json", "metrics.json", "manifest.json"

_FORMAT = 1
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
    """A checkpoint as it was saved; `tensors` are on the CPU, the model is still in its folder."""

    path: Path
    state: TrainerState
    tensors: dict[str, Any]
    metrics: dict[str, float]

    @property
    def model_path(self) -> Path:
        return self.path / MODEL


class CheckpointStore:
    """The checkpoints of one run, as `checkpointing.*` asks for them.

    The `keep_top_k` best by `metric_name` are kept, and the newest always besides; without a metric
    the best are the newest. A metric is spelt as NeMo-RL does (`val:accuracy`, `train:loss`), or as
    it stands in the metrics (`val/accuracy`).
    """

    def __init__(self, keys: Checkpointing) -> None:
        self.checkpoint_dir = Path(keys.checkpoint_dir)
        self._keys = keys

    def due(self, step: int) -> bool:
        """Whether `save_period` asks for a checkpoint after this step (steps count from 1)."""
        return step > 0 and step % self._keys.save_period == 0

    def save(
        self,
        *,
        write_model: Callable[[Path], None],
        tensors: Mapping[str, object],
        state: TrainerState,
        metrics: Mapping[str, float],
    ) -> Path:
        """Write the checkpoint of `state.step` and return its folder; then remove what is not kept.

        `write_model` fills an empty folder in Hugging Face format. `tensors` must load with
        `weights_only=True`, which is checked here rather than at the resume. Non-finite metrics
        are left out: they rank nothing. Raises UserError if the disk is full or the folder cannot
        be written; earlier checkpoints are then untouched and nothing partial remains.
        """
        final = self.checkpoint_dir / f"step_{state.step:08d}"
        temporary = self.checkpoint_dir / f"{_SAVING}{final.name}"
        try:
            self._clean_leftovers()
            (temporary / MODEL).mkdir(parents=True)
            write_model(temporary / MODEL)
            # Through a Python file object: torch's own file writer loses the errno of a full disk.
            with open(temporary / TENSORS, "wb") as file:
                torch.save(dict(tensors), file)
            torch.load(temporary / TENSORS, map_location="cpu", weights_only=True, mmap=True)
            _write_json(temporary / STATE, {"format": _FORMAT, **dataclasses.asdict(state)})
            finite = {name: float(v) for name, v in metrics.items() if math.isfinite(v)}
            _write_json(temporary / METRICS, finite)
            seal(temporary)
            self._publish(temporary, final)
        except BaseException as error:
            reason = self._save_failure(error, temporary, tensors, state.step)
            shutil.rmtree(temporary, ignore_errors=True)
            if reason is not None:
                raise UserError(reason) from error
            raise
        self._prune(state.step)
        return final

    def latest(self) -> Path | None:
        """The newest intact checkpoint, or None; a damaged one is named in a CheckpointWarning with
        the file at fault, and the one before it is tried."""
        paths = list(self._candidates().values())
        for path, following in zip_longest(paths, paths[1:]):
            damage = find_damage(path)
            if damage is None:
                return path
            instead = f"trying {following.name}" if following else "there is no other one"
            message = f"checkpoint {path} is damaged and is not used: {damage}; {instead}"
            warnings.warn(message, CheckpointWarning, stacklevel=2)
        return None

    def load(self, path: Path) -> LoadedCheckpoint:
        """Read a checkpoint that `latest` found. Raises UserError for another version's format."""
        state = json.loads((path / STATE).read_bytes())
        if (version := state.pop("format")) != _FORMAT:
            raise UserError(f"checkpoint {path} has format {version}; this version reads {_FORMAT}")
        state.pop("best_metric", None)  # Format 1 may hold it, always null.
        return LoadedCheckpoint(
            path=path,
            state=TrainerState(**state),
            tensors=torch.load(path / TENSORS, map_location="cpu", weights_only=True),
            metrics=json.loads((path / METRICS).read_bytes()),
        )

    def discard_after(self, step: int) -> None:
        """Remove the checkpoints beyond `step`: a run that resumes from there writes its own, and
        these are the newest of a history that no longer exists."""
        for number, path in self._candidates().items():
            if number > step:
                _remove(path)

    def _prune(self, newest: int) -> None:
        """Remove all but the newest and the `keep_top_k` best, the newer of equals."""
        if self._keys.keep_top_k is None:
            return
        sign, found = 1.0 if self._keys.higher_is_better else -1.0, self._candidates()

        def rank(step: int) -> tuple[float, int]:
            value = self._metric(found[step])
            return (-math.inf if value is None else sign * value, step)

        whole = [step for step, path in found.items() if not find_damage(path, contents=False)]
        kept = {newest, *sorted(whole, key=rank, reverse=True)[: self._keys.keep_top_k]}
        for step in found.keys() - kept:
            _remove(found[step])

    def _candidates(self) -> dict[int, Path]:
        """All published checkpoints by their steps, newest first.

        One that was being replaced by a second save of its step when the process died counts
        while its successor does not exist.
        """
        found: dict[int, Path] = {}
        for before in (_REPLACED, ""):
            for path in self.checkpoint_dir.glob(f"{before}step_*"):
                if (number := path.name.removeprefix(f"{before}step_")).isdecimal():
                    found[int(number)] = path
        return dict(sorted(found.items(), reverse=True))

    def _metric(self, path: Path) -> float | None:
        name = self._keys.metric_name
        if name is None:
            return None
        try:
            metrics = json.loads((path / METRICS).read_bytes())
        except ValueError:
            return None  # damaged: it ranks last, and `latest` names it
        spellings = (name, name.replace(":", "/", 1), name.partition(":")[2])
        return next((metrics[key] for key in spellings if key in metrics), None)

    def _publish(self, temporary: Path, final: Path) -> None:
        replaced = final.with_name(f"{_REPLACED}{final.name}")
        if final.exists():
            # A folder cannot be renamed over a full one: the old one steps aside first, and
            # counts as this step's checkpoint until the new one has its name.
            os.rename(final, replaced)
        os.rename(temporary, final)
        fsync_folder(self.checkpoint_dir)
        if replaced.exists():
            _remove(replaced)

    def _clean_leftovers(self) -> None:
        """Remove what a killed save or removal left behind; bring back an orphaned `replaced`."""
        self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        for entry in list(self.checkpoint_dir.iterdir()):
            original = entry.with_name(entry.name.removeprefix(_REPLACED))
            if entry.name.startswith((_SAVING, _REMOVING)):
                shutil.rmtree(entry)
            elif entry != original and original.exists():
                _remove(entry)
            elif entry != original:
                os.rename(entry, original)

    def _save_failure(
        self, error: BaseException, temporary: Path, tensors: Mapping[str, object], step: int
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
        free = shutil.disk_usage(self.checkpoint_dir).free
        native_writer = isinstance(error, (OSError, RuntimeError)) and free < 64 * 1024
        if not is_disk_full(error) and not native_writer:
            return None
        held = sum(each.nbytes for each in tree_leaves(tensors) if isinstance(each, torch.Tensor))
        previous = max(map(_folder_bytes, self._candidates().values()), default=0)
        needed = max(previous, _folder_bytes(temporary / MODEL) + held) / 1e6
        room = (free + _folder_bytes(temporary)) / 1e6
        return (
            f"no space left for {where}: it needs at least {needed:,.1f} MB, {room:,.1f} MB are "
            "free; earlier checkpoints are untouched. Free some space, lower "
            "checkpointing.keep_top_k, or set checkpointing.checkpoint_dir to another disk"
        )


def seal(folder: Path) -> None:
    """Sync all files and folders; last, the manifest over them (sizes and SHA-256) likewise."""
    paths = sorted(folder.rglob("*"))
    files = {}
    for path in filter(Path.is_file, paths):
        fsync_file(path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    (folder / MANIFEST).write_bytes(_render_manifest(files))
    fsync_file(folder / MANIFEST)
    for path in (folder, *filter(Path.is_dir, paths)):
        fsync_folder(path)


def find_damage(path: Path, *, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint folder, naming the file, or None if it is intact.

    With `contents` every file is read once and its SHA-256 compared with the manifest; without,
    the manifest, which covers itself, and the names and sizes in it are looked at.
    """
    name = MANIFEST
    try:
        data = (path / MANIFEST).read_bytes()
        files = json.loads(data)["files"]
        if _render_manifest(files) != data:
            raise ValueError
        for name, entry in files.items():
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes instead of {entry['bytes']}"
            if contents and _sha256(path / name) != entry["sha256"]:
                raise ValueError
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    except (ValueError, TypeError, KeyError):
        return f"{name} does not match its checksum"
    return None


def _render_manifest(files: dict[str, dict]) -> bytes:
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": digest}, sort_keys=True, indent=1).encode()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def capture_rng() -> dict[str, Any]:
    """States of the global generators (Python, numpy, torch, every CUDA device).

    Plain numbers and tensors only, so that they load with `weights_only=True`.
    """
    name, words, *rest = np.random.get_state()
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, np.asarray(words).tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_rng(states: Mapping[str, Any]) -> None:
    """Undo `capture_rng`. CUDA states are restored only where as many devices are present."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if len(states.get("cuda", ())) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(states["cuda"])


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a crash half-way never leaves a torn one under its name."""
    doomed = path.with_name(f"{_REMOVING}{path.name.lstrip('.')}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

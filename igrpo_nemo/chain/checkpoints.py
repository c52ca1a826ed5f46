"""The checkpoints of a run folder, of either engine: which there are, and in what form.

RUN/checkpoints/step_N/model/                       embedded engine: a Hugging Face folder
RUN/checkpoints/step_N/policy/weights/...           NeMo-RL: Megatron-Core, DTensor or Hugging Face
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from igrpo_nemo.chain.adapters import WEIGHTS
from igrpo_nemo.errors import UserError
from igrpo_nemo.run.folder import CONFIG, stored_config

_STEP = re.compile(r"step_(\d+)")


class Form(Enum):
    HUGGING_FACE = "Hugging Face"
    """A folder that transformers and vLLM load as it is."""
    MEGATRON = "Megatron-Core"
    """Megatron-Core's distributed checkpoint: iter_0000000."""
    ADAPTERS = "low-rank adapters"
    """Of DTensor: adapter_model.safetensors, which belongs to the model that was trained."""
    DCP = "DTensor"
    """torch.distributed.checkpoint: .distcp files with a .metadata file."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint: `folder` is step_N, `weights` what a converter or a server reads."""

    step: int
    folder: Path
    form: Form
    weights: Path


def find_checkpoint(run: Path, which: str) -> Checkpoint:
    """The checkpoint `last`, `best` or number `which` of a run folder.

    `best` ranks by `checkpointing.metric_name` of the run. Raises `UserError` for a checkpoint
    that is not there, and for weights that cannot become a Hugging Face folder.
    """
    if not (run / CONFIG).is_file():
        raise UserError(f"{run} is no run folder (it has no config.yaml): train first")
    settings = stored_config(run).get("checkpointing") or {}
    folders = _step_folders(run, settings.get("checkpoint_dir"))
    if not folders:
        raise UserError(f"{run} has no checkpoint: train first, with checkpointing.enabled=true")
    if which == "last":
        step = max(folders)
    elif which == "best":
        step = _best_step(run, folders, settings)
    elif which.isdecimal() and int(which) in folders:
        step = int(which)
    else:
        known = ", ".join(str(step) for step in sorted(folders))
        raise UserError(f"{run} has no checkpoint {which}: give last, best or one of {known}")
    form, weights = _weights(folders[step])
    return Checkpoint(step, folders[step], form, weights)


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder holds a model with weights that transformers would load."""
    if not (folder / "config.json").is_file():
        return False
    return any(any(folder.glob(f"*.{ending}")) for ending in ("safetensors", "bin"))


def _step_folders(run: Path, configured: str | None) -> dict[int, Path]:
    inside = run / "checkpoints"
    # A run folder that was moved keeps its checkpoints inside.
    folder = inside if inside.is_dir() or not configured else Path(configured)
    matches = ((_STEP.fullmatch(path.name), path) for path in folder.glob("step_*/"))
    return {int(match[1]): path for match, path in matches if match}


def _best_step(run: Path, folders: Mapping[int, Path], settings: Mapping[str, Any]) -> int:
    name, sign = settings.get("metric_name"), 1 if settings.get("higher_is_better", True) else -1
    if not name:
        raise UserError(f"{run} has no checkpointing.metric_name to rank by: give last or a step")
    values = {step: _metric(folder, name) for step, folder in folders.items()}
    ranked = {step: sign * value for step, value in values.items() if value is not None}
    if not ranked:
        raise UserError(f"no checkpoint of {run} has {name}: give last or a step")
    return max(ranked, key=lambda step: (ranked[step], step))


def _metric(folder: Path, name: str) -> float | None:
    """The metric as either engine wrote it: under NeMo-RL's name (val:accuracy) or its own."""
    for file in ("metrics.json", "training_info.json"):
        try:
            metrics = json.loads((folder / file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for key in (name, name.replace(":", "/", 1), name.partition(":")[2]):
            if isinstance(value := metrics.get(key), int | float):
                return float(value)
    return None


def _weights(folder: Path) -> tuple[Form, Path]:
    saved = folder / "policy" / "weights"
    ready = (folder / "model", saved, saved / "model" / "consolidated")
    for candidate in ready:
        if is_hugging_face(candidate):
            return Form.HUGGING_FACE, candidate
    if (saved / "model" / WEIGHTS).is_file():
        return Form.ADAPTERS, saved / "model"
    if iterations := sorted(saved.glob("iter_*")):
        return Form.MEGATRON, iterations[-1]
    if (saved / ".metadata").is_file() or (saved / "model" / ".metadata").is_file():
        return Form.DCP, saved
    if any(saved.rglob("*.safetensors")):
        raise UserError(
            f"{folder} holds safetensors shards of DTensor, which NeMo-RL has no converter for: "
            "train with checkpointing.save_consolidated=true"
        )
    raise UserError(f"{folder} holds no weights in a known form: choose another checkpoint")

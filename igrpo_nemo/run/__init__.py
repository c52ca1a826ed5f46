"""One run: its folder and lock, its stop file, and what its config describes, ready for an engine.

Here: the config that belongs to a model, and the threads of a process that will import torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from igrpo_nemo.config import Config

PARENTS_SEARCHED = 4
"""A model lies this deep in its run folder at most: checkpoints/step_N/model."""


def set_threads(threads: int | None) -> None:
    """Fixes the number of CPU threads, where given, and lets idle ones sleep.

    To be called before torch is imported. Waiting threads that spin starve the busy ones on a
    shared machine.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)


def config_of_model(model: Path, overrides: Sequence[str]) -> Config:
    """The config that a model is evaluated under: its run's own, or composed from overrides."""
    from igrpo_nemo.config import load_config, read_config
    from igrpo_nemo.config.compose import quoted
    from igrpo_nemo.run.folder import CONFIG

    folder = model.resolve()
    for parent in (folder, *folder.parents[: PARENTS_SEARCHED - 1]):
        if (parent / CONFIG).is_file():
            return read_config(parent / CONFIG, overrides)
    return load_config([f"policy.model_name={quoted(str(model))}", *overrides])

"""A run that is finished has nothing to submit, unless it is asked for more steps than it had."""

from __future__ import annotations

from pathlib import Path

import yaml

from igrpo_nemo.config import Config
from igrpo_nemo.tracking.run_folder import FINISHED

_LENGTH = ("max_num_steps", "max_num_epochs")


def is_finished(run_folder: Path, config: Config) -> bool:
    """Whether the last step of this config is done already."""
    return (run_folder / FINISHED).is_file() and not _is_longer(run_folder, config)


def reopen_if_longer(run_folder: Path, config: Config) -> bool:
    """Removes the marker of a finished run that is to go on; says whether it did. The job script
    looks at the marker before anything else."""
    marker = run_folder / FINISHED
    if not marker.is_file() or not _is_longer(run_folder, config):
        return False
    marker.unlink(missing_ok=True)
    return True


def _is_longer(run_folder: Path, config: Config) -> bool:
    path = run_folder / "config.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    before = values.get("grpo", {}) if isinstance(values, dict) else {}
    return any(
        isinstance(before.get(key), int) and getattr(config.grpo, key) > before[key]
        for key in _LENGTH
    )

"""A run folder belongs to one configuration: a changed setting is never silently mixed in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from igrpo_nemo.errors import UserError
from igrpo_nemo.files.scrub import flat, scrub

FREE_KEYS = (
    "logger.",
    "checkpointing.",
    "cluster.",
    "grpo.max_num_steps",
    "grpo.max_num_epochs",
    "policy.scheduler",
    "policy.megatron_cfg.scheduler.lr_decay_iters",
    "policy.megatron_cfg.scheduler.lr_warmup_iters",
    "policy.megatron_cfg.scheduler.lr_warmup_init",
    "grpo.val_",
    "grpo.max_val_samples",
    "igrpo.val_",
    "igrpo.sample_table_period",
    "igrpo.threads",
    "env.math.num_workers",
    "igrpo.site.",
    "igrpo.evaluation.",
    "igrpo.architecture.",
    "igrpo.preflight.",
)
"""Keys that may change between the parts of one run: they do not shape what is learned.

`policy.scheduler` and its lengths in Megatron's keys follow from `grpo.max_num_steps` and from
`igrpo.schedule`, which is not free: a run may be made longer, not be given another schedule.
"""


def check_same_run(run_folder: Path, config: Mapping[str, Any]) -> None:
    """Raises `UserError` where the folder's `config.yaml` is another run's, naming a key."""
    path = run_folder / "config.yaml"
    if not path.is_file():
        return
    before = _settings(yaml.safe_load(path.read_text()) or {})
    # The stored config is scrubbed: secrets neither compare nor show.
    now = _settings(scrub(config))
    for key in sorted(before.keys() | now.keys()):
        if key.startswith(FREE_KEYS):
            continue
        if before.get(key) != now.get(key):
            raise UserError(
                f"{run_folder} holds a run with {key}={before.get(key)!r}, this one has "
                f"{now.get(key)!r}: choose another logger.log_dir, or remove that folder"
            )


def _settings(config: object) -> dict[str, object]:
    """Dotted name -> value; an empty section sets nothing."""
    return {name: value for name, value in flat(config) if value != {}}

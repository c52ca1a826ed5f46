"""The project's config as NeMo-RL's `MasterConfig`.

Config (NeMo-RL's keys + igrpo) ─ master_config ─> MasterConfig
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igrpo_nemo.config.derive import rollout_steps
from igrpo_nemo.config.schema import Config
from igrpo_nemo.nemo.data import DATASET_PATH, PROCESSOR, VALIDATION_SPLIT
from igrpo_nemo.nemo.environment import ENV_NAME

LOGGER_DEFAULTS: dict[str, Any] = {
    "swanlab_enabled": False,
    "tensorboard": {},
    "monitor_gpus": False,
    "gpu_monitoring": {"collection_interval": 10, "flush_interval": 10},
}
DATA_PLANE_DEFAULTS: dict[str, Any] = {
    "impl": "transfer_queue",
    "backend": "simple",
    "storage_capacity": 1_000_000,
    "num_storage_units": 2,
    "claim_meta_poll_interval_s": 0.5,
    "global_segment_size": 2**39,
    "local_buffer_size": 2**36,
}
"""Upstream's example config; the last two are for the backend `mooncake_cpu`."""


@dataclass(frozen=True, slots=True)
class OpenedRun:
    """A config that is known to work, with its problems written down, and NeMo-RL's form of it."""

    config: Config
    master: Any
    num_problems: int
    total_steps: int


def master_config(
    config: Config, *, train_path: Path, validation_path: Path | None, num_validation: int
) -> Any:
    """NeMo-RL's typed config. `igrpo` rides along, so that checkpoints record it."""
    from nemo_rl.algorithms.grpo import MasterConfig

    values = copy.deepcopy(config.to_dict())
    values["data"] = _data(config, train_path, validation_path)
    values["env"] = {
        ENV_NAME: {"config": config.to_dict(), "tokenizer": values["policy"]["tokenizer"]}
    }
    values["logger"] = {**LOGGER_DEFAULTS, **values["logger"]}
    values["checkpointing"].setdefault("checkpoint_must_save_by", None)
    values["grpo"] |= _validation_sizes(config, num_validation)
    if (values.get("data_plane") or {}).get("enabled"):
        values["data_plane"] = {**DATA_PLANE_DEFAULTS, **values["data_plane"]}
    values["grpo"].setdefault("max_rollout_turns", 1)
    values["grpo"].setdefault("seq_logprob_error_threshold", None)
    scheduler = (values["policy"].get("megatron_cfg") or {}).get("scheduler")
    if scheduler is not None:
        # Else Megatron refuses a checkpoint whose schedule has another length: a longer run's.
        scheduler.setdefault("override_opt_param_scheduler", True)
    return MasterConfig(**values)


def _data(config: Config, train_path: Path, validation_path: Path | None) -> dict[str, Any]:
    source = {"dataset_name": DATASET_PATH, "processor": PROCESSOR, "env_name": ENV_NAME}
    data = config.data
    return {
        "max_input_seq_length": data.max_input_seq_length,
        "shuffle": data.shuffle,
        "num_workers": data.num_workers or 0,
        "use_multiple_dataloader": False,
        "train": {**source, "data_path": str(train_path), "split": "train"},
        "validation": None
        if validation_path is None
        else {**source, "data_path": str(validation_path), "split": VALIDATION_SPLIT},
    }


def _validation_sizes(config: Config, available: int) -> dict[str, int]:
    """NeMo-RL validates `max_val_samples // val_batch_size` whole batches."""
    samples = min(config.grpo.max_val_samples or available, available) or 1
    return {
        "max_val_samples": samples,
        "val_batch_size": min(config.grpo.val_batch_size or samples, samples),
    }


def total_steps(config: Config, num_problems: int) -> int:
    """Steps of the whole run, at most."""
    return rollout_steps(config, num_problems)

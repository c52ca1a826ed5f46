"""A run's config opened: its problems loaded and written down, everything checked, NeMo-RL's form.

Config (NeMo-RL's keys + igrpo) ─ open_run, as this machine can run it ─> MasterConfig

DTensor's packed rows need FlashAttention 2, which NeMo-RL's containers have in the workers'
environments. Elsewhere NeMo-RL would end while it loads the model: rows of like length are batched.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rl.algorithms.grpo import MasterConfig
from nemo_rl.algorithms.utils import get_tokenizer

from igrpo_nemo.config import Config, with_problems
from igrpo_nemo.config.checks import check_launch
from igrpo_nemo.config.derive import rollout_steps
from igrpo_nemo.errors import UserError
from igrpo_nemo.nemo.data import DATASET_PATH, PROCESSOR, VALIDATION_SPLIT, write_problems
from igrpo_nemo.nemo.environment import ENV_NAME
from igrpo_nemo.nemo.names import needed
from igrpo_nemo.nemo.processes import ONE_PYTHON, environments_of, policy_worker, source_tree
from igrpo_nemo.nemo.trainers import check_trainer, uses_data_plane
from igrpo_nemo.nemo.versions import required
from igrpo_nemo.run.core import prompt_builder
from igrpo_nemo.run.folder import RunFolder
from igrpo_nemo.run.identity import check_same_inputs, check_same_run
from igrpo_nemo.run.problems import fitting_problems, training_problems, validation_problems
from igrpo_nemo.run.tokenizer import check_tags_are_text, load_tokenizer


@dataclass(frozen=True, slots=True)
class OpenedRun:
    """A config that is known to work, with its problems written down, and NeMo-RL's form of it.

    `total_steps` is what the whole run has at most.
    """

    config: Config
    master: Any
    total_steps: int


def open_run(config: Config, folder: RunFolder) -> OpenedRun:
    """Loads the problems, fills in what follows from their number, and checks everything."""
    problems, validation = training_problems(config), validation_problems(config)
    if config.igrpo.model is not None:
        if config.igrpo.engine == "nemo_rl":
            raise UserError("engine=nemo_rl trains a Hugging Face model: use model=hf")
        from igrpo_nemo.nemo.cpu import with_small_model

        config = with_small_model(config)
    load_tokenizer(config.policy.tokenizer.name)  # a clear error, where there is none
    tokenizer = get_tokenizer(config.to_dict()["policy"]["tokenizer"])
    check_tags_are_text(tokenizer)
    prompts = prompt_builder(config, tokenizer)
    drop = config.igrpo.drop_overlong_prompts
    problems = fitting_problems(problems, prompts, drop_overlong=drop)
    validation = fitting_problems(validation, prompts, drop_overlong=drop)
    config = with_problems(config, len(problems))
    runnable = without_flash_attention(config)
    check_launch(runnable)
    check_trainer(config)
    check_same_run(folder.path, config.to_dict())
    check_same_inputs(folder.path, config, problems, validation)
    written = folder.path.resolve() / "problems"
    train_path, validation_path = written / "train.jsonl", written / "validation.jsonl"
    write_problems(problems, train_path)
    if validation:
        write_problems(validation, validation_path)
    master = master_config(
        runnable,
        train_path=train_path,
        validation_path=validation_path if validation else None,
        num_validation=len(validation),
    )
    folder.write_config(config.to_dict())
    return OpenedRun(config, master, rollout_steps(config, len(problems)))


def without_flash_attention(config: Config) -> Config:
    """The config as this machine can run it, and a line about what differs.

    Sequence packing becomes dynamic batching with as many tokens a micro-batch; DTensor v2, which
    asks for FlashAttention even without packing, gets PyTorch's attention.
    """
    dtensor = config.policy.dtensor
    if config.igrpo.engine != "nemo_rl" or not dtensor.get("enabled"):
        return config
    if has_flash_attention(config):
        return config
    changes = {}
    packing = config.policy.sequence_packing
    if dtensor.get("_v2") and not (dtensor.get("automodel_kwargs") or {}).get(
        "attn_implementation"
    ):
        kwargs = {**(dtensor.get("automodel_kwargs") or {}), "attn_implementation": "sdpa"}
        changes["dtensor_cfg"] = {**dtensor, "automodel_kwargs": kwargs}
    if packing.enabled:
        print(
            "flash-attn is not installed where DTensor trains: sequence packing is off, "
            f"dynamic batching of {packing.train_mb_tokens} tokens in its place"
        )
        changes["sequence_packing"] = packing.model_copy(update={"enabled": False})
        changes["dynamic_batching"] = {
            "enabled": True,
            "train_mb_tokens": packing.train_mb_tokens,
            "logprob_mb_tokens": packing.logprob_mb_tokens or packing.train_mb_tokens,
            "sequence_length_round": 64,  # as in NeMo-RL's example
        }
    return config.replaced("policy", **changes) if changes else config


def has_flash_attention(config: Config) -> bool:
    """Whether the Python of DTensor's worker has it. An environment that is yet to be made will."""
    if os.environ.get(ONE_PYTHON) == "1":
        return importlib.util.find_spec("flash_attn") is not None
    folder = environments_of(source_tree(), os.environ)
    environment = folder / policy_worker(config) if folder else None
    return (
        environment is None
        or not environment.is_dir()
        or any(environment.glob("lib/python*/*/flash_attn"))
    )


def master_config(
    config: Config, *, train_path: Path, validation_path: Path | None, num_validation: int
) -> MasterConfig:
    """NeMo-RL's typed config. `igrpo` rides along, so that checkpoints record it."""
    values = copy.deepcopy(config.to_dict())
    values["data"] = _data(config, train_path, validation_path)
    values["env"] = {
        ENV_NAME: {"config": config.to_dict(), "tokenizer": values["policy"]["tokenizer"]}
    }
    values["grpo"] |= _validation_sizes(config, num_validation)
    values["grpo"]["adv_estimator"] = _estimator(config)
    for section, defaults in needed()["defaults"].items():
        if section != "data_plane" or uses_data_plane(config):
            values[section] = defaults | values[section]
    scheduler = (values["policy"].get("megatron_cfg") or {}).get("scheduler")
    if scheduler is not None:
        # Else Megatron refuses a checkpoint whose schedule has another length: a longer run's.
        scheduler.setdefault("override_opt_param_scheduler", True)
    required(values)
    return MasterConfig(**values)


def _estimator(config: Config) -> dict[str, Any]:
    """Named, not left to a default: of the section's own two keys 0.7 makes one, main does not."""
    grpo = config.grpo
    return {
        "name": "grpo",
        "normalize_rewards": grpo.normalize_rewards,
        "use_leave_one_out_baseline": grpo.use_leave_one_out_baseline,
        "minus_baseline": True,
        **(grpo.adv_estimator or {}),
    }


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

"""What this package needs of NeMo-RL: its version, and every name and signature it relies on.

Checked before anything is started; imports nothing of NeMo-RL until then.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import typing

from igrpo_nemo.errors import UserError

SUPPORTED = (0, 7)
"""The NeMo-RL minor version whose sources this was read and tested against."""

ROLLOUTS = ("run_multi_turn_rollout", "run_async_multi_turn_rollout")

CALLERS = {
    "nemo_rl.algorithms.grpo": ROLLOUTS,
    "nemo_rl.algorithms.async_utils.trajectory_collector": ROLLOUTS[1:],
    "nemo_rl.experience.sync_rollout_actor": ROLLOUTS,
}
"""Modules that call the rollouts by these names: trainer, async collector, data-plane actor."""

NEEDED: dict[str, tuple[str, ...]] = {
    "nemo_rl.experience.rollouts:run_multi_turn_rollout": (
        "policy_generation", "input_batch", "tokenizer", "task_to_env", "max_seq_len",
        "max_rollout_turns", "greedy",
    ),
    "nemo_rl.experience.rollouts:run_async_multi_turn_rollout": (
        "policy_generation", "input_batch", "tokenizer", "task_to_env", "max_seq_len",
        "max_rollout_turns", "greedy",
    ),
    "nemo_rl.experience.rollouts:generate_responses": (
        "policy_generation", "generation_input_data", "batch", "tokenizer", "input_lengths",
        "greedy",
    ),
    "nemo_rl.experience.rollouts:generate_responses_async": (
        "policy_generation", "generation_input_data", "batch", "tokenizer", "input_lengths",
        "greedy",
    ),
    "nemo_rl.experience.rollouts:calculate_rewards": ("batch", "task_to_env"),
    "nemo_rl.algorithms.grpo:setup": (
        "master_config", "tokenizer", "dataset", "val_dataset", "policy_factory",
    ),
    "nemo_rl.algorithms.grpo:grpo_train": (
        "policy", "policy_generation", "wrapped_dataloader", "val_dataloader", "tokenizer",
        "loss_fn", "task_to_env", "val_task_to_env", "logger", "checkpointer", "grpo_save_state",
        "master_config",
    ),
    "nemo_rl.algorithms.grpo:async_grpo_train": (
        "policy", "policy_generation", "dataloader", "task_to_env", "val_task_to_env",
        "max_trajectory_age_steps",
    ),
    "nemo_rl.algorithms.grpo_sync:grpo_train_sync": (
        "policy", "policy_generation", "wrapped_dataloader", "task_to_env", "val_task_to_env",
    ),
    "nemo_rl.algorithms.grpo:MasterConfig": (),
    "nemo_rl.algorithms.grpo:RayVirtualCluster": (),
    "nemo_rl.algorithms.grpo:VllmGeneration": (),
    "nemo_rl.algorithms.grpo:_should_use_async_rollouts": ("master_config",),
    "nemo_rl.algorithms.utils:get_tokenizer": ("tokenizer_config",),
    "nemo_rl.algorithms.loss:ClippedPGLossFn": ("cfg",),
    "nemo_rl.algorithms.loss.interfaces:LossInputType": (),
    "nemo_rl.data_plane:build_data_plane_client": ("cfg", "bootstrap"),
    "nemo_rl.data_plane.column_io:read_columns": (
        "dp_client", "meta", "select_fields", "pad_value_dict",
    ),
    "nemo_rl.data_plane.column_io:write_columns": ("dp_client", "meta", "fields"),
    "nemo_rl.data_plane.schema:DP_TRAIN_FIELDS": (),
    "nemo_rl.data_plane.schema:GLOBAL_FORWARD_PAD_SEQLEN": (),
    "nemo_rl.data_plane.schema:LP_SEED_FIELDS": (),
    "nemo_rl.data.utils:setup_response_data": ("tokenizer", "data_config", "env_configs"),
    "nemo_rl.data.processors:register_processor": ("processor_name", "processor_function"),
    "nemo_rl.data.datasets.raw_dataset:RawDataset": (),
    "nemo_rl.distributed.batched_data_dict:BatchedDataDict": (),
    "nemo_rl.distributed.model_utils:get_next_token_logprobs_from_logits": (
        "input_ids", "next_token_logits", "vocab_parallel_rank", "vocab_parallel_group",
        "context_parallel_group", "sampling_params", "chunk_size",
    ),
    "nemo_rl.distributed.model_utils:ChunkedDistributedEntropy": (),
    "nemo_rl.distributed.named_sharding:NamedSharding": ("layout", "names"),
    "nemo_rl.distributed.ray_actor_environment_registry:ACTOR_ENVIRONMENT_REGISTRY": (),
    "nemo_rl.distributed.virtual_cluster:PY_EXECUTABLES": (),
    "nemo_rl.distributed.virtual_cluster:init_ray": (),
    "nemo_rl.environments.interfaces:EnvironmentInterface": (),
    "nemo_rl.environments.utils:register_env": ("env_name", "actor_class_fqn"),
    "nemo_rl.models.generation:configure_generation_config": ("config", "tokenizer"),
    "nemo_rl.models.generation.interfaces:GenerationInterface": (),
    "nemo_rl.models.policy.interfaces:ColocatablePolicyInterface": (),
    "nemo_rl.utils.checkpoint:CheckpointManager.init_tmp_checkpoint": (
        "step", "training_info", "run_config",
    ),
    "nemo_rl.utils.checkpoint:CheckpointManager.finalize_checkpoint": ("checkpoint_path",),
    "nemo_rl.utils.checkpoint:CheckpointManager.get_latest_checkpoint_path": ("self",),
    "nemo_rl.utils.timer:TimeoutChecker.check_save": ("self",),
}  # fmt: skip
"""Every name of NeMo-RL that this package stands on, with the parameters it passes."""

NEEDED_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "nemo_rl.models.generation.vllm.vllm_generation:VllmGeneration": (
        "worker_group", "current_generate_dp_shard_idx",
    ),
    "nemo_rl.distributed.worker_groups:RayWorkerGroup": ("dp_size",),
}  # fmt: skip
"""Attributes of objects, by class. Without these, requests of a group would silently no longer go
to one shard."""


def check_nemo_rl() -> None:
    """Raises `UserError` where NeMo-RL is missing or differs from what this package stands on."""
    if sys.version_info < (3, 12) and typing.TypedDict.__module__ == "typing":
        raise UserError(
            f"NeMo-RL's configs need Python 3.12 or newer, this is {sys.version_info[0]}."
            f"{sys.version_info[1]}: use 3.13, as its container does, or engine=local"
        )
    try:
        version = importlib.import_module("nemo_rl.package_info").VERSION
    except ImportError as error:
        raise UserError(
            f"NeMo-RL cannot be imported ({error}): use its 0.7.0 container, or put the source "
            "tree of v0.7.0 on PYTHONPATH; docs/install.md says how"
        ) from error
    if tuple(version[:2]) != SUPPORTED:
        found = ".".join(str(part) for part in version[:3])
        raise UserError(
            f"NeMo-RL {found} is installed, but igrpo-nemo needs "
            f"{SUPPORTED[0]}.{SUPPORTED[1]}.x: use the container of v0.7.0"
        )
    differences = [d for path, names in NEEDED.items() if (d := _difference(path, names))]
    for path, attributes in NEEDED_ATTRIBUTES.items():
        differences += _missing_attributes(path, attributes)
    for module, names in CALLERS.items():
        differences += [
            f"{module} has no {name}"
            for name in names
            if not hasattr(importlib.import_module(module), name)
        ]
    if differences:
        raise UserError(f"this NeMo-RL differs from v0.7.0: {'; '.join(differences)}")


def _difference(path: str, parameters: tuple[str, ...]) -> str | None:
    module_name, _, name = path.partition(":")
    try:  # boundary: whatever NeMo-RL's modules do when they are imported
        value: typing.Any = importlib.import_module(module_name)
        for part in name.split("."):
            value = getattr(value, part, None)
    except Exception as error:
        return f"{module_name} cannot be imported ({str(error).partition(chr(10))[0]})"
    if value is None:
        return f"{module_name} has no {name}"
    if not parameters:
        return None
    accepted = inspect.signature(value).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
        return None
    missing = [parameter for parameter in parameters if parameter not in accepted]
    return f"{module_name}.{name} takes no {', '.join(missing)}" if missing else None


def _missing_attributes(path: str, attributes: tuple[str, ...]) -> list[str]:
    """Attributes that a class neither has nor, by its source, gives to its objects."""
    difference = _difference(path, ())
    if difference:
        return [difference]
    module_name, _, name = path.partition(":")
    kind = getattr(importlib.import_module(module_name), name)
    source = inspect.getsource(kind)
    return [
        f"{module_name}.{name} has no {attribute}"
        for attribute in attributes
        if not hasattr(kind, attribute) and f"self.{attribute} = " not in source
    ]

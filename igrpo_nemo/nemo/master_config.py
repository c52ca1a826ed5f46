"""The project's config as NeMo-RL's `MasterConfig`, and what NeMo-RL would only find out late.

Config (NeMo-RL's keys + igrpo) ─ master_config ─> MasterConfig
                                ─ check_launch  ─> one clear line before anything is started
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from igrpo_nemo.config.derive import rollout_steps
from igrpo_nemo.config.schema import Config
from igrpo_nemo.errors import UserError
from igrpo_nemo.nemo.data import DATASET_PATH, PROCESSOR, VALIDATION_SPLIT
from igrpo_nemo.nemo.environment import ENV_NAME

LOGGER_DEFAULTS: dict[str, Any] = {
    "swanlab_enabled": False,
    "tensorboard": {},
    "monitor_gpus": False,
    "gpu_monitoring": {"collection_interval": 10, "flush_interval": 10},
}
NEMO_ADVANTAGE_DELTA = 1e-6
"""What NeMo-RL adds to the standard deviation of Eq. 4."""


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
    values["grpo"].setdefault("max_rollout_turns", 1)
    values["grpo"].setdefault("seq_logprob_error_threshold", None)
    _fill_megatron_schedule(values, config)
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


def _fill_megatron_schedule(values: dict[str, Any], config: Config) -> None:
    """`igrpo.schedule` in Megatron's keys, where these are left open."""
    scheduler = (values["policy"].get("megatron_cfg") or {}).get("scheduler")
    if scheduler is None or config.policy.scheduler is None:
        return
    updates = sum(
        stage["kwargs"].get("total_iters", 0) + stage["kwargs"].get("T_max", 0)
        for stage in config.policy.scheduler
        if "kwargs" in stage
    )
    ratio = config.igrpo.schedule.warmup_ratio
    if scheduler.get("lr_decay_iters") is None:
        scheduler["lr_decay_iters"] = updates
    if scheduler.get("lr_warmup_iters") is None:
        scheduler["lr_warmup_iters"] = min(math.ceil(ratio * updates), updates - 1)


def is_async_rollout(config: Config) -> bool:
    """Whether NeMo-RL will roll out through the asynchronous engine."""
    generation = config.policy.generation
    backend = generation.backend or ""
    if backend == "sglang":
        return bool(generation.use_async_rollouts)
    section = {"vllm": generation.vllm_cfg, "megatron": generation.mcore_generation_config}
    return bool((section.get(backend) or {}).get("async_engine", False))


def is_async_training(config: Config) -> bool:
    return bool((config.grpo.async_grpo or {}).get("enabled", False))


def check_launch(config: Config, num_problems: int) -> None:
    """Raises `UserError` with the first thing that this engine cannot do, or NeMo-RL rejects."""
    for message in _complaints(config, num_problems):
        raise UserError(message)


def _complaints(config: Config, num_problems: int) -> Iterator[str]:
    yield from _method(config)
    yield from _overlap(config, num_problems)
    yield from _async_training(config)
    yield from _entropy(config)
    if config.igrpo.engine == "nemo_rl":
        yield from _cluster(config)


def _method(config: Config) -> Iterator[str]:
    igrpo, grpo = config.igrpo, config.grpo
    if igrpo.advantage_delta != NEMO_ADVANTAGE_DELTA and grpo.normalize_rewards:
        yield (
            f"igrpo.advantage_delta={igrpo.advantage_delta:g}: NeMo-RL adds "
            f"{NEMO_ADVANTAGE_DELTA:g}; set it to that, or use engine=local"
        )
    if igrpo.feedback == "none" or "draft" not in igrpo.train_stages:
        return
    if grpo.use_dynamic_sampling:
        yield (
            "igrpo.train_stages=[draft, refine] with grpo.use_dynamic_sampling=true: NeMo-RL "
            "filters groups by the bare prompt, which would mix both stages; use [refine]"
        )
    if igrpo.draft_choice == "none" or igrpo.draft_dropout or igrpo.on_all_zero == "no_draft":
        yield (
            "igrpo.train_stages=[draft, refine] where q' may equal q (igrpo.draft_choice=none, "
            "igrpo.draft_dropout, igrpo.on_all_zero=no_draft): NeMo-RL groups rows by their "
            "prompt, which would mix both stages; use [refine]"
        )


def _overlap(config: Config, num_problems: int) -> Iterator[str]:
    igrpo = config.igrpo
    prefetch, short = igrpo.draft_prefetch != "off", igrpo.short_circuit != "off"
    if igrpo.feedback == "none":
        return
    if prefetch and config.data.use_multiple_dataloader:
        yield "igrpo.draft_prefetch=fused needs data.use_multiple_dataloader=false"
    if prefetch and is_async_training(config):
        yield "igrpo.draft_prefetch=fused is of no use with grpo.async_grpo: set it to off"
    if prefetch and (config.data_plane or {}).get("enabled"):
        yield "igrpo.draft_prefetch=fused needs data_plane.enabled=false"
    if not short:
        return
    if prefetch:
        yield "igrpo.short_circuit and igrpo.draft_prefetch exclude each other: set one to off"
    if not is_async_rollout(config):
        yield (
            f"igrpo.short_circuit={igrpo.short_circuit} needs the asynchronous engine: set "
            "policy.generation.vllm_cfg.async_engine=true"
        )
    if igrpo.draft_choice != "best" or igrpo.tie_break != "first":
        yield "igrpo.short_circuit needs igrpo.draft_choice=best and igrpo.tie_break=first"
    if "draft" in igrpo.train_stages:
        yield "igrpo.short_circuit cancels drafts, so igrpo.train_stages must be [refine]"


def _async_training(config: Config) -> Iterator[str]:
    """What upstream's example script rejects; `setup()` does not."""
    grpo = config.grpo
    if not is_async_training(config):
        return
    unsupported = {
        "grpo.use_dynamic_sampling": grpo.use_dynamic_sampling,
        "grpo.reward_scaling.enabled": grpo.reward_scaling.enabled,
        "grpo.reward_shaping.enabled": grpo.reward_shaping.enabled,
        "data.use_multiple_dataloader": config.data.use_multiple_dataloader,
        "data_plane.enabled": (config.data_plane or {}).get("enabled"),
    }
    for key, value in unsupported.items():
        if value:
            yield f"{key}=true does not go with grpo.async_grpo.enabled=true: set one to false"
    if not is_async_rollout(config):
        yield (
            "grpo.async_grpo.enabled=true needs the asynchronous engine: set "
            "policy.generation.vllm_cfg.async_engine=true"
        )
    if not config.loss_fn.use_importance_sampling_correction:
        yield (
            "grpo.async_grpo.enabled=true needs loss_fn.use_importance_sampling_correction=true, "
            "because its rollouts are not on-policy"
        )
    if (config.policy.generation.colocated or {}).get("enabled", True):
        yield (
            "grpo.async_grpo.enabled=true needs dedicated generation GPUs: set "
            "policy.generation.colocated.enabled=false"
        )


def _entropy(config: Config) -> Iterator[str]:
    if not config.igrpo.entropy.exact:
        return
    generation, megatron = config.policy.generation, config.policy.megatron_cfg or {}
    dtensor = config.policy.dtensor_cfg or {}
    contexts = [
        cfg.get("context_parallel_size", 1) for cfg in (megatron, dtensor) if cfg.get("enabled")
    ]
    why = None
    if generation.top_p != 1.0 or generation.top_k is not None:
        why = "trains on filtered log-probs with policy.generation.top_p or top_k"
    elif any(size > 1 for size in contexts):
        why = "splits a sequence over ranks with context_parallel_size above 1"
    elif config.policy.sequence_packing.fuse_loss:
        why = "hides the logits with policy.sequence_packing.fuse_loss=true"
    if why:
        yield f"igrpo.entropy.exact=true: NeMo-RL {why}; set it to false"


def _cluster(config: Config) -> Iterator[str]:
    policy, cluster = config.policy, config.cluster
    megatron, dtensor = policy.megatron_cfg or {}, policy.dtensor_cfg or {}
    if bool(megatron.get("enabled")) == bool(dtensor.get("enabled")):
        yield "exactly one of policy.megatron_cfg.enabled and policy.dtensor_cfg.enabled is true"
    nodes, gpus = _training_machines(config)
    world = nodes * gpus
    if world < 1:
        yield (
            f"no GPU is left for training: cluster has {cluster.num_nodes} nodes of "
            f"{cluster.gpus_per_node}, and policy.generation.colocated.resources takes them all"
        )
        return
    parallel = _model_parallel(megatron, dtensor)
    if world % parallel:
        yield f"{world} training GPUs are no multiple of the {parallel} of one model replica"
    elif policy.train_global_batch_size % (world // parallel):
        yield (
            f"policy.train_global_batch_size={policy.train_global_batch_size} is no multiple of "
            f"the {world // parallel} data-parallel replicas"
        )
    if megatron.get("tensor_model_parallel_size", 1) >= 4 and megatron.get("enabled"):
        if policy.train_micro_batch_size != policy.logprob_batch_size:
            yield (
                "tensor parallelism of 4 and more needs policy.logprob_batch_size equal to "
                "policy.train_micro_batch_size"
            )
    if policy.sequence_packing.enabled and (policy.dynamic_batching or {}).get("enabled"):
        yield "policy.sequence_packing and policy.dynamic_batching exclude each other"


def _training_machines(config: Config) -> tuple[int, int]:
    """Nodes and GPUs per node that train."""
    nodes, gpus = config.cluster.num_nodes, config.cluster.gpus_per_node
    colocated = config.policy.generation.colocated or {}
    if colocated.get("enabled", True):
        return nodes, gpus
    resources = colocated.get("resources") or {}
    if nodes == 1:
        return 1, gpus - int(resources.get("gpus_per_node") or 0)
    return nodes - int(resources.get("num_nodes") or 0), gpus


def _model_parallel(megatron: dict[str, Any], dtensor: dict[str, Any]) -> int:
    if megatron.get("enabled"):
        names = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
        sizes = [megatron.get(name, 1) for name in names]
        return math.prod(sizes) * megatron.get("context_parallel_size", 1)
    return dtensor.get("tensor_parallel_size", 1) * dtensor.get("context_parallel_size", 1)


def total_steps(config: Config, num_problems: int) -> int:
    """Steps of the whole run, at most."""
    return rollout_steps(config, num_problems)

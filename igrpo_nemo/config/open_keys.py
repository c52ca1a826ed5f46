"""The values inside NeMo-RL's open mappings that checks and estimates compute with: their types.

`nemo_only` leaves `policy.megatron_cfg`, `policy.generation.vllm_cfg` and the like to NeMo-RL,
whose own code would trip over a wrong type late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from igrpo_nemo.config.schema import Config


@dataclass(frozen=True, slots=True)
class _Kind:
    """A type of value: how to tell it, how to say it, and one that works."""

    says: str
    accepts: Callable[[Any], bool]
    works: str


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_SIZE = _Kind("a whole number of 1 or more", lambda v: _is_integer(v) and v >= 1, "1")
_TENSOR = _Kind("a whole number of 1 or more", lambda v: _is_integer(v) and v >= 1, "2")
_TOKENS = _Kind("a whole number of 1 or more", lambda v: _is_integer(v) and v >= 1, "16384")
_BOOLEAN = _Kind("true or false", lambda v: isinstance(v, bool), "false")
_SWITCH = _Kind("true or false", lambda v: isinstance(v, bool), "true")
_SHARE = _Kind(
    "a number above 0 and up to 1",
    lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 < v <= 1,
    "0.85",
)
_COUNT = _Kind("null or a whole number", lambda v: v is None or _is_integer(v) and v >= 0, "null")
_GRANULARITY = _Kind("full or selective", lambda v: v in ("full", "selective"), "full")

TYPES: dict[str, _Kind] = {
    "policy.megatron_cfg.enabled": _SWITCH,
    "policy.megatron_cfg.tensor_model_parallel_size": _TENSOR,
    "policy.megatron_cfg.pipeline_model_parallel_size": _SIZE,
    "policy.megatron_cfg.context_parallel_size": _SIZE,
    "policy.megatron_cfg.sequence_parallel": _BOOLEAN,
    "policy.megatron_cfg.activation_checkpointing": _SWITCH,
    "policy.megatron_cfg.recompute_granularity": _GRANULARITY,
    "policy.megatron_cfg.defer_fp32_logits": _SWITCH,
    "policy.megatron_cfg.optimizer.use_distributed_optimizer": _SWITCH,
    "policy.megatron_cfg.optimizer.use_precision_aware_optimizer": _SWITCH,
    "policy.megatron_cfg.optimizer.optimizer_cpu_offload": _BOOLEAN,
    "policy.megatron_cfg.distributed_data_parallel_config.grad_reduce_in_fp32": _BOOLEAN,
    "policy.dtensor_cfg.enabled": _BOOLEAN,
    "policy.dtensor_cfg.tensor_parallel_size": _SIZE,
    "policy.dtensor_cfg.context_parallel_size": _SIZE,
    "policy.dtensor_cfg.activation_checkpointing": _SWITCH,
    "policy.dtensor_cfg.cpu_offload": _BOOLEAN,
    "policy.dynamic_batching.enabled": _BOOLEAN,
    "policy.dynamic_batching.train_mb_tokens": _TOKENS,
    "policy.generation.vllm_cfg.tensor_parallel_size": _SIZE,
    "policy.generation.vllm_cfg.pipeline_parallel_size": _SIZE,
    "policy.generation.vllm_cfg.gpu_memory_utilization": _SHARE,
    "policy.generation.vllm_cfg.max_model_len": _TOKENS,
    "policy.generation.vllm_cfg.async_engine": _SWITCH,
    "policy.generation.vllm_cfg.enforce_eager": _BOOLEAN,
    "policy.generation.vllm_kwargs.max_num_seqs": _SIZE,
    "policy.generation.colocated.enabled": _SWITCH,
    "policy.generation.colocated.resources.gpus_per_node": _COUNT,
    "policy.generation.colocated.resources.num_nodes": _COUNT,
    "grpo.async_grpo.enabled": _BOOLEAN,
}
"""Types of the values that the checks and the preflight compute with, where they are given."""

_ABSENT = object()


def open_key_problems(config: Config) -> Iterator[str]:
    """A line for every wrong type inside the open mappings."""
    values = config.to_dict()
    for path, kind in TYPES.items():
        value = _at(values, path)
        if value is not _ABSENT and not kind.accepts(value):
            shown = "null" if value is None else str(value)
            yield f"{path}={shown} should be {kind.says}: set {path}={kind.works}"


def _at(values: Any, path: str) -> Any:
    for name in path.split("."):
        if not isinstance(values, dict) or name not in values:
            return _ABSENT
        values = values[name]
    return values

"""Which GPUs train and which generate, and how a model is spread over them, from the config.

cluster + policy.generation.colocated.resources --> Machines
policy.megatron_cfg | policy.dtensor_cfg        --> Parallel
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from igrpo_nemo.config.schema import Config


@dataclass(frozen=True, slots=True)
class Machines:
    """GPUs of a run under engine `nemo_rl`; colocated ones both train and generate."""

    training: int
    generation: int
    total: int
    colocated: bool


def machines(config: Config) -> Machines:
    """NeMo-RL's split of the cluster; a share of 0 or less says that it is impossible."""
    nodes, gpus = config.cluster.num_nodes, config.cluster.gpus_per_node
    total = nodes * gpus
    sampling = config.policy.generation
    if sampling.is_colocated:
        return Machines(total, total, total, True)
    resources = (sampling.colocated or {}).get("resources") or {}
    if nodes == 1:
        generation = int(resources.get("gpus_per_node") or 0)
    else:
        generation = int(resources.get("num_nodes") or 0) * gpus
    return Machines(total - generation, generation, total, False)


@dataclass(frozen=True, slots=True)
class Parallel:
    """How one replica of the policy is spread: tensor, pipeline and context parallel sizes.

    `prefix` is the section of the backend that trains.
    """

    backend: Literal["megatron", "dtensor"]
    tensor: int
    pipeline: int
    context: int
    sequence: bool

    @property
    def replica(self) -> int:
        """GPUs of one replica."""
        return self.tensor * self.pipeline * self.context

    @property
    def prefix(self) -> str:
        return f"policy.{self.backend}_cfg"

    @property
    def tensor_key(self) -> str:
        name = "tensor_model_parallel_size" if self.backend == "megatron" else TENSOR
        return f"{self.prefix}.{name}"


TENSOR = "tensor_parallel_size"


def parallel(config: Config) -> Parallel:
    """The training backend's sizes."""
    megatron, dtensor = config.policy.megatron, config.policy.dtensor
    if megatron.get("enabled"):
        return Parallel(
            "megatron",
            megatron.get("tensor_model_parallel_size", 1),
            megatron.get("pipeline_model_parallel_size", 1),
            megatron.get("context_parallel_size", 1),
            bool(megatron.get("sequence_parallel")),
        )
    return Parallel(
        "dtensor",
        dtensor.get(TENSOR, 1),
        1,
        dtensor.get("context_parallel_size", 1),
        bool(dtensor.get("sequence_parallel")),
    )


@dataclass(frozen=True, slots=True)
class LowRank:
    """Adapters that are trained in place of the weights: W + (alpha / dim) B A (arXiv 2106.09685).

    `section` are NeMo-RL's keys of the backend that trains, `key` where they stand.
    """

    key: str
    section: Mapping[str, Any]

    @property
    def dim(self) -> int:
        """The rank."""
        return int(self.section.get("dim", 0))

    def adapts(self, module: str) -> bool:
        """Whether linear layers of this name have one; a pattern of a path stands for its last
        part."""
        if self.section.get("match_all_linear"):
            return True
        patterns = self.section.get("target_modules") or ()
        if not patterns:
            return module not in (self.section.get("exclude_modules") or ())
        return any(fnmatchcase(module, each.rpartition(".")[2]) for each in patterns)


LOW_RANK = {"megatron": "peft", "dtensor": "lora_cfg"}
"""Where each backend's adapters are configured."""


def low_rank(config: Config) -> LowRank | None:
    """The training backend's adapters; None where all weights are trained."""
    spread = parallel(config)
    name = LOW_RANK[spread.backend]
    backend = config.policy.megatron if spread.backend == "megatron" else config.policy.dtensor
    section = backend.get(name) or {}
    return LowRank(f"{spread.prefix}.{name}", section) if section.get("enabled") else None


def replicas(config: Config) -> int:
    """Data parallel size of training."""
    return machines(config).training // parallel(config).replica


def generation_parallel(config: Config) -> int:
    """GPUs of one inference engine: tensor times pipeline parallel size."""
    vllm = config.policy.generation.vllm
    return vllm.get(TENSOR, 1) * vllm.get("pipeline_parallel_size", 1)


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

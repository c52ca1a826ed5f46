"""Every estimate of a config whose checks passed, and what does not fit.

config -> shape, questions, context, steps
       -> engine nemo_rl: training memory, vLLM memory | others: the embedded engine's memory
       -> shortages: what needs more memory than there is
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from igrpo_nemo.config import Config, rollout_steps
from igrpo_nemo.preflight.checks import usable
from igrpo_nemo.preflight.gpu import GIB, GPU, GPUS
from igrpo_nemo.preflight.lengths import Context, context
from igrpo_nemo.preflight.local_memory import (
    FUSED_FAMILIES,
    LocalMemory,
    local_memory,
    local_work,
)
from igrpo_nemo.preflight.questions import Questions, questions
from igrpo_nemo.preflight.shape import Shape
from igrpo_nemo.preflight.training_memory import TrainingMemory, training_memory
from igrpo_nemo.preflight.vllm_memory import TRAINER_ASLEEP, VllmMemory, vllm_memory

Kind = Literal["training", "vllm", "local"]


@dataclass(frozen=True, slots=True)
class Shortage:
    """Something that does not fit, in words that end before what would."""

    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class Estimates:
    """Sizes in bytes. `capacity` is what a training GPU, or the machine, offers; `steps` are None
    where the number of problems is not known."""

    questions: Questions
    context: Context
    steps: int | None
    gpu: GPU | None = None
    capacity: int = 0
    training: TrainingMemory | None = None
    vllm: VllmMemory | None = None
    local: LocalMemory | None = None
    shortages: tuple[Shortage, ...] = ()


def estimate(config: Config, shape: Shape | None, machine_memory: int | None = None) -> Estimates:
    """The estimates; without a shape only what the data say.

    `machine_memory` is this machine's, in bytes, for the embedded engine; None asks the system.
    """
    asked = questions(config)
    budget = context(config, asked)
    count = usable(config, asked, budget)
    steps = None if count is None else max(1, rollout_steps(config, count))
    if shape is None:
        return Estimates(asked, budget, steps)
    if config.igrpo.engine == "nemo_rl":
        return _cluster(config, shape, asked, budget, steps)
    return _local(config, shape, asked, budget, steps, machine_memory)


def system_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:  # boundary: absent outside of Linux and of control groups
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as stream:
            limit = stream.read().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdecimal() else total


def _cluster(
    config: Config, shape: Shape, asked: Questions, budget: Context, steps: int | None
) -> Estimates:
    gpu = GPUS[config.igrpo.site.gpu]
    capacity = int((1 - config.igrpo.preflight.memory_reserve) * gpu.memory)
    training = training_memory(config, shape)
    vllm = vllm_memory(config, shape, gpu) if config.policy.generation.backend == "vllm" else None
    shortages = []
    if training.total > capacity:
        shortages.append(
            Shortage(
                "training",
                f"training needs {training.total / GIB:.1f} GiB of each {gpu.name}, which has "
                f"{capacity / GIB:.1f} GiB beside its reserve",
            )
        )
    if vllm is not None and (text := _vllm_shortage(config, vllm, gpu)):
        shortages.append(Shortage("vllm", text))
    return Estimates(asked, budget, steps, gpu, capacity, training, vllm, None, tuple(shortages))


def _vllm_shortage(config: Config, vllm: VllmMemory, gpu: GPU) -> str | None:
    utilization = (config.policy.generation.vllm_cfg or {}).get("gpu_memory_utilization", 0.9)
    key = f"policy.generation.vllm_cfg.gpu_memory_utilization={utilization:g}"
    colocated = (config.policy.generation.colocated or {}).get("enabled", True)
    if colocated and vllm.budget + TRAINER_ASLEEP > gpu.memory:
        return (
            f"{key} leaves {(gpu.memory - vllm.budget) / GIB:.1f} GiB of each {gpu.name} to the "
            f"sleeping trainer, which keeps {TRAINER_ASLEEP / GIB:.1f} GiB"
        )
    if vllm.fitting(vllm.max_model_len) >= 1:
        return None
    return (
        f"{key} leaves vLLM {max(vllm.cache, 0) / GIB:.1f} GiB of cache, and q' with its "
        f"refinement ({vllm.max_model_len} tokens) needs "
        f"{vllm.sequence(vllm.max_model_len) / GIB:.1f} GiB"
    )


def _local(
    config: Config,
    shape: Shape,
    asked: Questions,
    budget: Context,
    steps: int | None,
    machine_memory: int | None,
) -> Estimates:
    gpu = GPUS.get(config.igrpo.site.gpu)
    if shape.family not in FUSED_FAMILIES:
        return Estimates(asked, budget, steps, gpu)
    local = local_memory(shape, local_work(config, budget))
    capacity = gpu.memory if gpu else (machine_memory or system_memory())
    shortages = []
    if local.total > capacity:
        where = f"the {gpu.name}" if gpu else "this machine"
        shortages.append(
            Shortage(
                "local",
                f"engine {config.igrpo.engine} needs {local.total / GIB:.1f} GiB, and {where} has "
                f"{capacity / GIB:.1f} GiB",
            )
        )
    return Estimates(asked, budget, steps, gpu, capacity, None, None, local, tuple(shortages))

"""The preflight: every check and estimate of a config, and the nearest setting where one fails.

config -> checks -> shape, questions, context, steps -> training memory, vLLM memory, disk
       -> shortages, each with the mildest change that ends it -> costs of both methods -> Plan

Needs no GPU, no weights and no network, and imports neither torch nor transformers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace

from igrpo_nemo.config import Config, rollout_steps
from igrpo_nemo.config.igrpo_keys import time_in_seconds
from igrpo_nemo.config.launch_checks import launch_problems
from igrpo_nemo.preflight.capacity import (
    GIB,
    GPU,
    GPUS,
    FreeSpace,
    checkpoint_space,
    disk_shortages,
    dumped_bytes,
    free_space,
)
from igrpo_nemo.preflight.checks import (
    data_notes,
    data_problems,
    gpu_problems,
    schedule_notes,
    shape_problems,
    usable,
)
from igrpo_nemo.preflight.cost import Cost, Estimator
from igrpo_nemo.preflight.nearest import nearest, words
from igrpo_nemo.preflight.plan import Estimates, Plan, Shortage
from igrpo_nemo.preflight.shape import Shape, counts, differs_from_folder, shape_of
from igrpo_nemo.preflight.tokens import context, questions, responses
from igrpo_nemo.preflight.training_memory import trained_parameters, training_memory
from igrpo_nemo.preflight.vllm_memory import TRAINER_ASLEEP, VllmMemory, vllm_memory


def preflight(
    config: Config,
    *,
    environ: Mapping[str, str] = os.environ,
    free: FreeSpace = free_space,
) -> Plan:
    """The plan of a composed config.

    Args:
        config: What `load_config` made.
        environ: Where `HF_HOME` names the cache that may hold the model's config.json.
        free: Free bytes of a folder's file system, for the checkpoints.

    Raises:
        UserError: a model's config.json or a data file cannot be read.
    """
    if problems := list(gpu_problems(config)) or launch_problems(config):
        return Plan(config, problems)
    shape = shape_of(config, environ)
    parameters = None if shape is None else counts(shape).total
    if shape is not None and (problems := list(shape_problems(config, shape))):
        return Plan(config, problems, shape=shape, parameters=parameters)
    found = estimate(config, shape)
    problems = list(data_problems(config, found.questions, found.context))
    problems += [_with_remedy(config, shortage, environ) for shortage in found.shortages]
    notes = list(_notes(config, shape, found))
    for lacks, fatal in disk_shortages(config, found.disk, found.dumps, free):
        (problems if fatal else notes).append(lacks)
    plan = Plan(config, problems, notes, shape, parameters, found)
    return plan if problems else _with_cost(plan)


def estimate(config: Config, shape: Shape | None) -> Estimates:
    """The estimates of a config whose checks passed; without a shape only what the data say.

    Memory is estimated for engine `nemo_rl` alone.
    """
    asked = questions(config)
    budget = context(config, asked)
    count = usable(config, asked, budget)
    steps = None if count is None else max(1, rollout_steps(config, count))
    mean = config.igrpo.preflight.response_share * budget.new_tokens
    found = Estimates(asked, budget, steps, dumps=dumped_bytes(config, mean, steps))
    if shape is not None:
        found = replace(
            found, disk=checkpoint_space(config, trained_parameters(config, shape), steps)
        )
    if shape is None or config.igrpo.engine != "nemo_rl":
        return found
    gpu = GPUS[config.igrpo.site.gpu]
    capacity = int((1 - config.igrpo.preflight.memory_reserve) * gpu.memory)
    training = training_memory(config, shape)
    vllm = vllm_memory(config, shape, gpu) if config.policy.generation.backend == "vllm" else None
    shortages = []
    if training.total > capacity:
        text = (
            f"training needs {training.total / GIB:.1f} GiB of each {gpu.name}, which has "
            f"{capacity / GIB:.1f} GiB beside its reserve"
        )
        shortages.append(Shortage("training", text))
    if vllm is not None and (text := _vllm_shortage(config, vllm, gpu)):
        shortages.append(Shortage("vllm", text))
    estimated = replace(found, gpu=gpu, capacity=capacity, training=training, vllm=vllm)
    return replace(estimated, shortages=tuple(shortages))


def _vllm_shortage(config: Config, vllm: VllmMemory, gpu: GPU) -> str | None:
    utilization = config.policy.generation.vllm.get("gpu_memory_utilization", 0.9)
    key = f"policy.generation.vllm_cfg.gpu_memory_utilization={utilization:g}"
    if config.policy.generation.is_colocated and vllm.budget + TRAINER_ASLEEP > gpu.memory:
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


def _with_remedy(config: Config, shortage: Shortage, environ: Mapping[str, str]) -> str:
    """The shortage with the mildest change that ends it and makes nothing else worse."""

    def fits(candidate: Config) -> bool:
        if launch_problems(candidate):
            return False
        shape = shape_of(candidate, environ)
        if shape is None or any(shape_problems(candidate, shape)):
            return False
        left = estimate(candidate, shape).shortages
        return shortage.kind not in {each.kind for each in left}

    change = nearest(config, shortage.kind, fits)
    if change is None:
        return f"{shortage.text}; no single change or pair of changes helps: use a larger cluster"
    return f"{shortage.text}: {words(change)}"


def _with_cost(plan: Plan) -> Plan:
    """The plan with both methods' costs, where there is a roofline for them."""
    found, shape = plan.estimates, plan.shape
    assert found is not None
    if shape is None or found.gpu is None or found.vllm is None or found.steps is None:
        return plan
    estimator = Estimator(
        config=plan.config,
        shape=shape,
        gpu=found.gpu,
        vllm=found.vllm,
        context=found.context,
        responses=responses(plan.config),
        steps=found.steps,
    )
    cost = estimator.cost()
    notes = [*plan.notes, *_time_notes(plan.config, cost)]
    return replace(plan, notes=notes, cost=cost, other=estimator.other_method())


def _time_notes(config: Config, cost: Cost) -> Iterator[str]:
    """How many jobs of the site's time limit the run takes."""
    site = config.igrpo.site
    if site.time is None:
        return
    limit = time_in_seconds(site.time) - site.save_margin_s
    jobs = math.ceil(cost.hours * 3600 / limit) if limit > 0 else 1
    if jobs > 1:
        yield f"about {jobs} jobs of {site.time}: igrpo launch --chain {jobs}"


def _notes(config: Config, shape: Shape | None, found: Estimates) -> Iterator[str]:
    yield from data_notes(config, found.questions, found.context)
    if shape is None:
        yield (
            f"{config.policy.model_name} has no config.json here and igrpo.architecture is null: "
            "memory and cost are not estimated"
        )
        return
    if differs_from_folder(config, shape):
        yield f"igrpo.architecture differs from {shape.source}: the file is believed"
    if config.igrpo.engine != "nemo_rl":
        yield f"memory and cost of engine {config.igrpo.engine} are not estimated"
    elif found.vllm is None:
        yield (
            f"generation with policy.generation.backend={config.policy.generation.backend} is not "
            "estimated, so there is no cost"
        )
    yield from schedule_notes(config, found.questions, found.context, found.steps)

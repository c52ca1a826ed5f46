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
from igrpo_nemo.preflight.checks import data_notes, data_problems, shape_problems, usable
from igrpo_nemo.preflight.cost import Estimator
from igrpo_nemo.preflight.disk import (
    FreeSpace,
    checkpoint_space,
    disk_shortages,
    dumped_bytes,
    free_space,
)
from igrpo_nemo.preflight.memory import (
    GIB,
    GPUS,
    TRAINER_ASLEEP,
    trained_parameters,
    training_memory,
    vllm_memory,
)
from igrpo_nemo.preflight.nearest import nearest, words
from igrpo_nemo.preflight.plan import Estimates, Plan
from igrpo_nemo.preflight.shape import differs_from_folder, shape_of
from igrpo_nemo.preflight.tokens import context, questions, responses


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
    plan = estimated(config, environ)
    if (found := plan.estimates) is None:
        return plan
    problems = [*data_problems(config, found.questions, found.context)]
    for kind, text in _shortages(plan):
        problems.append(f"{text}{_remedy(config, kind, environ)}")
    notes = [*_notes(plan)]
    for lacks, fatal in disk_shortages(config, found.disk, found.dumps, free):
        (problems if fatal else notes).append(lacks)
    plan = replace(plan, problems=problems, notes=notes)
    return plan if problems else _with_cost(plan)


def estimated(config: Config, environ: Mapping[str, str]) -> Plan:
    """Checks, shape and estimates; the latter only where the checks passed, and without a shape
    only what the data say. Memory is estimated for engine `nemo_rl` alone."""
    if config.igrpo.engine == "nemo_rl" and (kind := config.igrpo.site.gpu) not in GPUS:
        line = f"igrpo.site.gpu={kind}, but engine nemo_rl trains on GPUs: set cluster=a100_2x8"
        return Plan(config, [line])
    if problems := launch_problems(config):
        return Plan(config, problems)
    shape = shape_of(config, environ)
    if shape is not None and (problems := list(shape_problems(config, shape))):
        return Plan(config, problems, shape=shape)
    asked = questions(config, environ)
    budget = context(config, asked)
    count = usable(config, asked, budget)
    steps = None if count is None else max(1, rollout_steps(config, count))
    mean = config.igrpo.preflight.response_share * budget.new_tokens
    found = Estimates(asked, budget, steps, dumped_bytes(config, mean, steps))
    if shape is not None:
        disk = checkpoint_space(config, trained_parameters(config, shape), steps)
        found = replace(found, disk=disk)
    if shape is not None and config.igrpo.engine == "nemo_rl":
        gpu = GPUS[config.igrpo.site.gpu]
        vllm = config.policy.generation.backend == "vllm"
        found = replace(
            found,
            gpu=gpu,
            capacity=int((1 - config.igrpo.preflight.memory_reserve) * gpu.memory),
            training=training_memory(config, shape),
            vllm=vllm_memory(config, shape, gpu) if vllm else None,
        )
    return Plan(config, [], shape=shape, estimates=found)


def _shortages(plan: Plan) -> Iterator[tuple[str, str]]:
    """Memory that does not fit, training's and vLLM's, in words that end before what would."""
    found, generation = plan.estimates, plan.config.policy.generation
    if found is None or found.gpu is None or found.training is None:
        return
    gpu, vllm = found.gpu, found.vllm
    if found.training.total > found.capacity:
        yield (
            "training",
            f"training needs {found.training.total / GIB:.1f} GiB of each {gpu.name}, which has "
            f"{found.capacity / GIB:.1f} GiB beside its reserve",
        )
    if vllm is None:
        return
    utilization = generation.vllm.get("gpu_memory_utilization", 0.9)
    key = f"policy.generation.vllm_cfg.gpu_memory_utilization={utilization:g}"
    if generation.is_colocated and vllm.budget + TRAINER_ASLEEP > gpu.memory:
        yield (
            "vllm",
            f"{key} leaves {(gpu.memory - vllm.budget) / GIB:.1f} GiB of each {gpu.name} to the "
            f"sleeping trainer, which keeps {TRAINER_ASLEEP / GIB:.1f} GiB",
        )
    elif vllm.fitting(longest := vllm.max_model_len) < 1:
        yield (
            "vllm",
            f"{key} leaves vLLM {max(vllm.cache, 0) / GIB:.1f} GiB of cache, and q' with its "
            f"refinement ({longest} tokens) needs {vllm.sequence(longest) / GIB:.1f} GiB",
        )


def _remedy(config: Config, kind: str, environ: Mapping[str, str]) -> str:
    """The mildest change that ends a shortage and is refused by no check."""

    def fits(candidate: Config) -> bool:
        plan = estimated(candidate, environ)
        return plan.fits and plan.shape is not None and kind not in dict(_shortages(plan))

    change = nearest(config, kind, fits)
    if change is None:
        return "; no single change or pair of changes helps: use a larger cluster"
    return f": {words(change)}"


def _with_cost(plan: Plan) -> Plan:
    """The plan with both methods' costs, where there is a roofline for them."""
    found, config, site = plan.estimates, plan.config, plan.config.igrpo.site
    if found is None or found.gpu is None or found.vllm is None or found.steps is None:
        return plan
    assert plan.shape is not None
    drawn = responses(config)
    estimator = Estimator(
        config, plan.shape, found.gpu, found.vllm, found.context, drawn, found.steps
    )
    cost, notes = estimator.cost(), [*plan.notes]
    limit = time_in_seconds(site.time) - site.save_margin_s if site.time else 0
    if limit > 0 and (jobs := math.ceil(cost.hours * 3600 / limit)) > 1:
        notes.append(f"about {jobs} jobs of {site.time}: igrpo launch --chain {jobs}")
    return replace(plan, notes=notes, cost=cost, other=estimator.other_method())


def _notes(plan: Plan) -> Iterator[str]:
    config, shape, found = plan.config, plan.shape, plan.estimates
    assert found is not None
    backend = config.policy.generation.backend
    if shape is None:
        yield (
            f"{config.policy.model_name} has no config.json here and igrpo.architecture is null: "
            "memory and cost are not estimated"
        )
    elif differs_from_folder(config, shape):
        yield f"igrpo.architecture differs from {shape.source}: the file is believed"
    if shape is not None and config.igrpo.engine != "nemo_rl":
        yield f"memory and cost of engine {config.igrpo.engine} are not estimated"
    elif shape is not None and found.vllm is None:
        yield (
            f"generation with policy.generation.backend={backend} is not estimated, so there is no "
            "cost"
        )
    yield from data_notes(config, found.questions, found.context, found.steps)

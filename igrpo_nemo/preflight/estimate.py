"""The preflight: every check and estimate of a config, and the nearest setting where one fails.

config -> checks of it, of the shape, of the data: one line each, with a value that works
       -> shape, questions, context, steps -> training memory, vLLM memory, disk
       -> shortages, each with the mildest change that ends it -> costs of both methods -> Plan

Needs no GPU, no weights and no network, and imports neither torch nor transformers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from igrpo_nemo.config import Config, rollout_steps
from igrpo_nemo.config.checks import broken_rules, launch_problems
from igrpo_nemo.config.derive import largest_divisor
from igrpo_nemo.config.igrpo_keys import time_in_seconds
from igrpo_nemo.config.machines import TENSOR, low_rank, machines, parallel
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
from igrpo_nemo.preflight.plan import Plan
from igrpo_nemo.preflight.shape import HEAD, Shape, shape_of
from igrpo_nemo.preflight.tokens import Context, Questions, context, questions, responses, usable

VLLM_TENSOR = f"policy.generation.vllm_cfg.{TENSOR}"
KV_HEADS = "key-value heads"
_RULES = yaml.safe_load(Path(__file__).with_name("rules.yaml").read_text(encoding="utf-8"))


def preflight(
    config: Config,
    *,
    environ: Mapping[str, str] = os.environ,
    free: FreeSpace = free_space,
) -> Plan:
    """The plan of a composed config.

    Args:
        config: What `load_config` made.
        environ: Where `HF_HOME` names the cache that may hold the model's config.json; that of
            `igrpo.site` comes first.
        free: Free bytes of a folder's file system, for the checkpoints.

    Raises:
        UserError: a model's config.json or a data file cannot be read.
    """
    if home := config.igrpo.site.hf_home:
        environ = {**environ, "HF_HOME": home}
    plan = estimated(config, environ)
    if plan.questions is None or plan.context is None:
        return plan
    facts = {**config.to_dict(), "is": _data_facts(plan, plan.questions, plan.context)}
    plan.problems += broken_rules(_RULES["data"], facts)
    for kind, text in _shortages(plan):
        plan.problems.append(f"{text}{_remedy(config, kind, environ)}")
    plan.notes += broken_rules(_RULES["notes"], facts)
    for lacks, fatal in disk_shortages(config, plan.disk, plan.dumps, free):
        (plan.problems if fatal else plan.notes).append(lacks)
    if plan.fits:
        _add_cost(plan)
    return plan


def estimated(config: Config, environ: Mapping[str, str]) -> Plan:
    """Checks, shape and estimates; the latter only where the checks passed, and without a shape
    only what the data say. Memory is estimated for engine `nemo_rl` alone."""
    plan, cluster = Plan(config), config.igrpo.engine == "nemo_rl"
    if cluster and (kind := config.igrpo.site.gpu) not in GPUS:
        line = f"igrpo.site.gpu={kind}, but engine nemo_rl trains on GPUs: set cluster=a100_2x8"
        plan.problems.append(line)
    else:
        plan.problems += launch_problems(config)
    if not plan.problems and (shape := shape_of(config, environ)) is not None:
        plan.shape = shape
        facts = {**config.to_dict(), "is": _shape_facts(config, shape)}
        plan.problems += broken_rules(_RULES["shape"], facts)
        plan.problems += _tensor_parallel(config, shape) if cluster else ()
    if plan.problems:
        return plan
    plan.questions = questions(config, environ)
    plan.context = context(config, plan.questions)
    count = usable(config, plan.questions, plan.context)
    plan.steps = steps = None if count is None else max(1, rollout_steps(config, count))
    mean = config.igrpo.preflight.response_share * plan.context.new_tokens
    plan.dumps = dumped_bytes(config, mean, steps)
    if (shape := plan.shape) is not None:
        plan.disk = checkpoint_space(config, trained_parameters(config, shape), steps)
    if shape is not None and cluster:
        plan.gpu = gpu = GPUS[config.igrpo.site.gpu]
        plan.capacity = int((1 - config.igrpo.preflight.memory_reserve) * gpu.memory)
        plan.training = training_memory(config, shape)
        if config.policy.generation.backend == "vllm":
            plan.vllm = vllm_memory(config, shape, gpu)
    return plan


def _shortages(plan: Plan) -> Iterator[tuple[str, str]]:
    """Memory that does not fit, training's and vLLM's, in words that end before what would."""
    generation, gpu, vllm = plan.config.policy.generation, plan.gpu, plan.vllm
    if gpu is None or plan.training is None:
        return
    if plan.training.total > plan.capacity:
        yield (
            "training",
            f"training needs {plan.training.total / GIB:.1f} GiB of each {gpu.name}, which has "
            f"{plan.capacity / GIB:.1f} GiB beside its reserve",
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
        two_stage = plan.config.feedback.two_stage
        asked = "q' with its refinement" if two_stage else "q with its completion"
        yield (
            "vllm",
            f"{key} leaves vLLM {max(vllm.cache, 0) / GIB:.1f} GiB of cache, and {asked} "
            f"({longest} tokens) needs {vllm.sequence(longest) / GIB:.1f} GiB",
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


def _add_cost(plan: Plan) -> None:
    """Both methods' costs, where there is a roofline for them."""
    config, site = plan.config, plan.config.igrpo.site
    shape, gpu, vllm = plan.shape, plan.gpu, plan.vllm
    if shape is None or gpu is None or vllm is None or plan.context is None or plan.steps is None:
        return
    drawn = responses(config)
    estimator = Estimator(config, shape, gpu, vllm, plan.context, drawn, plan.steps)
    plan.cost, plan.other = estimator.cost(), estimator.other_method()
    limit = time_in_seconds(site.time) - site.save_margin_s if site.time else 0
    if limit > 0 and (jobs := math.ceil(plan.cost.hours * 3600 / limit)) > 1:
        plan.notes.append(f"about {jobs} jobs of {site.time}: igrpo launch --chain {jobs}")


def _shape_facts(config: Config, shape: Shape) -> dict[str, Any]:
    """What rules.yaml asks of a shape: what its context holds, what does not divide it."""
    spread, adapters = parallel(config), low_rank(config)
    overrides: dict[str, Any] = config.policy.hf_config_overrides or {}
    stages = machines(config).training // (spread.tensor * spread.context)
    head = HEAD[spread.backend]
    return {
        "cluster": config.igrpo.engine == "nemo_rl",
        "held": overrides.get("max_position_embeddings") or shape.context,
        "adapters": adapters.key if adapters else None,
        "adapted_embedding": bool(adapters and shape.tied and adapters.adapts(head)),
        "head": head,
        "backend": spread.backend,
        "depth": shape.depth,
        "pipeline": spread.pipeline,
        "fitting_pipeline": largest_divisor(math.gcd(shape.depth, stages), spread.pipeline),
        "mamba_layers": shape.mamba_layers,
    }


def _data_facts(plan: Plan, asked: Questions, budget: Context) -> dict[str, Any]:
    """What it asks of the data: problems for a batch, questions that do not fit, what is left."""
    config, grpo = plan.config, plan.config.grpo
    count = usable(config, asked, budget)
    batch = round(grpo.num_prompts_per_step * grpo.batch_multiplier)
    return {
        "batch": batch,
        "fitting_problems": max(1, int((count or 0) / grpo.batch_multiplier)),
        "too_long": asked.said_above(config.data.max_input_seq_length - budget.template),
        "longest": max(asked.longest, default=0) + budget.template,
        "described": plan.shape is not None,
        "usable": count,
        "left_over": (count or 0) % batch,
        "two_stage": config.feedback.two_stage,
        "clipped": budget.clipped,
        "clipped_percent": f"{100 * budget.clipped:.0f}",
        "steps": plan.steps,
    }


def _tensor_parallel(config: Config, shape: Shape) -> Iterator[str]:
    spread, per_node = parallel(config), config.cluster.gpus_per_node
    vllm = config.policy.generation.vllm.get(TENSOR, 1)
    for key, tensor, megatron in (
        (spread.tensor_key, spread.tensor, spread.backend == "megatron"),
        (VLLM_TENSOR, vllm, False),
    ):
        fine = (2**n for n in range(7, -1, -1) if not _undivided(shape, 2**n, megatron))
        works = next(size for size in fine if size <= min(tensor, per_node))
        if tensor > per_node:
            yield f"{key}={tensor} reaches across nodes of {per_node} GPUs: set {key}={works}"
        elif what := _undivided(shape, tensor, megatron):
            yield f"{key}={tensor} does not divide the model's {what}: set {key}={works}"


def _undivided(shape: Shape, tensor: int, megatron: bool) -> str:
    """What tensor parallelism does not divide. vLLM repeats key-value heads, Megatron-Core does
    not."""
    parts = {"attention heads": shape.heads}
    if megatron or tensor % shape.kv_heads:
        parts[f"query groups ({KV_HEADS})" if megatron else KV_HEADS] = shape.kv_heads
    parts["feed-forward channels"] = shape.intermediate
    if shape.mamba is not None:
        parts |= {"Mamba heads": shape.mamba.heads, "Mamba groups": shape.mamba.groups}
    return next((f"{count} {what}" for what, count in parts.items() if count % tensor), "")

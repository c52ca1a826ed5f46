"""Checks that need more than the config: the model's shape, the problems, the GPU's kind.

config -> launch_problems + these -> one line each, with a value that works
       -> notes: what is worth knowing and stops nobody
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from igrpo_nemo.config import Config
from igrpo_nemo.config.derive import largest_divisor
from igrpo_nemo.config.machines import TENSOR, low_rank, machines, parallel
from igrpo_nemo.preflight.capacity import GPUS
from igrpo_nemo.preflight.shape import HEAD, Shape
from igrpo_nemo.preflight.tokens import Context, Questions

VLLM_TENSOR = f"policy.generation.vllm_cfg.{TENSOR}"
_CLIPPED = 0.25
"""Share of shortened drafts from which a note says so."""


def gpu_problems(config: Config) -> Iterator[str]:
    """Engine `nemo_rl` trains on GPUs of a known kind."""
    if config.igrpo.engine == "nemo_rl" and config.igrpo.site.gpu not in GPUS:
        yield (
            f"igrpo.site.gpu={config.igrpo.site.gpu}, but engine nemo_rl trains on GPUs: set "
            "cluster=a100_2x8"
        )


def shape_problems(config: Config, shape: Shape) -> Iterator[str]:
    """What the model does not divide into, and what its context does not hold."""
    yield from _context(config, shape)
    if config.igrpo.engine != "nemo_rl":
        return
    yield from _tensor_parallel(config, shape)
    adapters, head = low_rank(config), HEAD[parallel(config).backend]
    if adapters is not None and shape.tied and adapters.adapts(head):
        yield (
            f"{adapters.key} puts an adapter on {head}, which is the embedding of this model, so "
            f"that vLLM would sample without it: set lora={parallel(config).backend}"
        )
    yield from _pipeline(config, shape)
    if shape.mamba_layers and config.policy.sequence_packing.enabled:
        yield (
            "policy.sequence_packing.enabled=true, but the state of a Mamba layer would run from "
            "one packed row into the next: set policy.sequence_packing.enabled=false"
        )


def _context(config: Config, shape: Shape) -> Iterator[str]:
    total = config.policy.max_total_sequence_length
    overrides: dict[str, Any] = config.policy.hf_config_overrides or {}
    limit = overrides.get("max_position_embeddings") or shape.context
    if overrides.get("rope_scaling") or total <= limit:
        return
    yield (
        f"policy.max_total_sequence_length={total} is more than the model's context of {limit}: "
        f"set policy.max_total_sequence_length={limit}"
    )


def _tensor_parallel(config: Config, shape: Shape) -> Iterator[str]:
    spread, per_node = parallel(config), config.cluster.gpus_per_node
    vllm = config.policy.generation.vllm.get(TENSOR, 1)
    for key, tensor, megatron in (
        (spread.tensor_key, spread.tensor, spread.backend == "megatron"),
        (VLLM_TENSOR, vllm, False),
    ):
        if tensor > per_node:
            yield (
                f"{key}={tensor} reaches across nodes of {per_node} GPUs: set "
                f"{key}={_works(shape, per_node, megatron)}"
            )
            continue
        for what, count in _divided(shape, megatron):
            if count % tensor and not (what == "key-value heads" and tensor % count == 0):
                yield (
                    f"{key}={tensor} does not divide the model's {count} {what}: set "
                    f"{key}={_works(shape, tensor, megatron)}"
                )
                break


def _divided(shape: Shape, megatron: bool) -> list[tuple[str, int]]:
    """What tensor parallelism divides. vLLM repeats key-value heads, Megatron-Core does not."""
    parts = [("attention heads", shape.heads)]
    if megatron:
        parts.append(("query groups (key-value heads)", shape.kv_heads))
    else:
        parts.append(("key-value heads", shape.kv_heads))
    parts.append(("feed-forward channels", shape.intermediate))
    if shape.mamba is not None:
        parts += [("Mamba heads", shape.mamba.heads), ("Mamba groups", shape.mamba.groups)]
    return parts


def _works(shape: Shape, limit: int, megatron: bool) -> int:
    """The largest tensor parallel size up to `limit` that divides the model."""
    for tensor in range(limit, 1, -1):
        fine = all(
            count % tensor == 0 or (what == "key-value heads" and tensor % count == 0)
            for what, count in _divided(shape, megatron)
        )
        if fine and tensor & (tensor - 1) == 0:
            return tensor
    return 1


def _pipeline(config: Config, shape: Shape) -> Iterator[str]:
    spread, megatron = parallel(config), config.policy.megatron
    uneven = (
        megatron.get("num_layers_in_first_pipeline_stage"),
        megatron.get("num_layers_in_last_pipeline_stage"),
    )
    if spread.pipeline > 1 and shape.depth % spread.pipeline and uneven == (None, None):
        key = "policy.megatron_cfg.pipeline_model_parallel_size"
        stages = machines(config).training // (spread.tensor * spread.context)
        works = largest_divisor(math.gcd(shape.depth, stages), spread.pipeline)
        yield (
            f"{key}={spread.pipeline} does not divide the model's {shape.depth} layers: set "
            f"{key}={works}"
        )


def data_problems(config: Config, asked: Questions, budget: Context) -> Iterator[str]:
    """Too few problems for a batch, questions that do not fit, no room for a draft."""
    grpo = config.grpo
    batch = round(grpo.num_prompts_per_step * grpo.batch_multiplier)
    if asked.count is not None and asked.count < batch:
        fits = int(asked.count / grpo.batch_multiplier)
        yield (
            f"grpo.num_prompts_per_step={grpo.num_prompts_per_step} draws batches of {batch} "
            f"problems, and data.train has {asked.count}: set grpo.num_prompts_per_step={fits}"
        )
    limit = config.data.max_input_seq_length
    if (too_long := _too_long(asked, limit - budget.template)) and not (
        config.igrpo.drop_overlong_prompts
    ):
        longest = asked.tokens[1.0] + budget.template
        yield (
            f"data.max_input_seq_length={limit}: {too_long} questions have more tokens with their "
            f"template, up to {longest}, which would end the run at its start: set "
            "igrpo.drop_overlong_prompts=true"
        )


def _too_long(asked: Questions, limit: int) -> str | None:
    """How many questions are longer, in words; None where none is."""
    count = asked.above(limit)
    if count is None:
        return f"at least {len(asked.longest)}" if asked.longest else "some"
    return str(count) if count else None


def data_notes(config: Config, asked: Questions, budget: Context) -> Iterator[str]:
    """What is left out, shortened or not known."""
    limit = config.data.max_input_seq_length - budget.template
    if config.igrpo.drop_overlong_prompts and (too_long := _too_long(asked, limit)):
        yield f"{too_long} questions are longer than data.max_input_seq_length and are left out"
    if asked.count is None:
        yield "the number of problems is known when the data is loaded: no steps, no cost of a run"
    if config.feedback.two_stage and budget.clipped > _CLIPPED:
        yield (
            f"{100 * budget.clipped:.0f} % of the drafts are shortened in q' at the assumed "
            "lengths: raise policy.max_total_sequence_length where the model allows it"
        )


def schedule_notes(
    config: Config, asked: Questions, budget: Context, steps: int | None
) -> Iterator[str]:
    """What batches and checkpoints make of the problems and the steps."""
    count = usable(config, asked, budget)
    batch = round(config.grpo.num_prompts_per_step * config.grpo.batch_multiplier)
    if count is not None and count >= batch and count % batch:
        yield f"{count % batch} of {count} problems are left over in each epoch"
    period = config.checkpointing.save_period
    if steps is not None and config.checkpointing.enabled and period > steps:
        yield (
            f"checkpointing.save_period={period} is more than the {steps} steps: one checkpoint, "
            "at the end"
        )
    if config.grpo.use_dynamic_sampling:
        yield "dynamic sampling may draw several batches a step: the cost counts one"


def usable(config: Config, asked: Questions, budget: Context) -> int | None:
    """Problems that are trained on: those whose question fits."""
    if asked.count is None or not config.igrpo.drop_overlong_prompts:
        return asked.count
    above = asked.above(config.data.max_input_seq_length - budget.template)
    return asked.count - (above or 0)

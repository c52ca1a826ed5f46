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
from igrpo_nemo.preflight.shape import HEAD, Shape
from igrpo_nemo.preflight.tokens import Context, Questions

VLLM_TENSOR = f"policy.generation.vllm_cfg.{TENSOR}"
KV_HEADS = "key-value heads"
_CLIPPED = 0.25
"""Share of shortened drafts from which a note says so."""


def shape_problems(config: Config, shape: Shape) -> Iterator[str]:
    """What the model does not divide into, and what its context does not hold."""
    total = config.policy.max_total_sequence_length
    overrides: dict[str, Any] = config.policy.hf_config_overrides or {}
    limit = overrides.get("max_position_embeddings") or shape.context
    if total > limit and not overrides.get("rope_scaling"):
        yield (
            f"policy.max_total_sequence_length={total} is more than the model's context of "
            f"{limit}: set policy.max_total_sequence_length={limit}"
        )
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


def _pipeline(config: Config, shape: Shape) -> Iterator[str]:
    spread, megatron = parallel(config), config.policy.megatron
    uneven = [megatron.get(f"num_layers_in_{end}_pipeline_stage") for end in ("first", "last")]
    if shape.depth % spread.pipeline and uneven == [None, None]:
        key = "policy.megatron_cfg.pipeline_model_parallel_size"
        stages = machines(config).training // (spread.tensor * spread.context)
        works = largest_divisor(math.gcd(shape.depth, stages), spread.pipeline)
        yield (
            f"{key}={spread.pipeline} does not divide the model's {shape.depth} layers: set "
            f"{key}={works}"
        )


def data_problems(config: Config, asked: Questions, budget: Context) -> Iterator[str]:
    """Too few problems for a batch, questions that do not fit."""
    grpo, batch = config.grpo, _batch(config)
    if asked.count is not None and asked.count < batch:
        fits = int(asked.count / grpo.batch_multiplier)
        yield (
            f"grpo.num_prompts_per_step={grpo.num_prompts_per_step} draws batches of {batch} "
            f"problems, and data.train has {asked.count}: set grpo.num_prompts_per_step={fits}"
        )
    limit, drop = config.data.max_input_seq_length, config.igrpo.drop_overlong_prompts
    if (too_long := _too_long(asked, limit - budget.template)) and not drop:
        longest = asked.tokens[1.0] + budget.template
        yield (
            f"data.max_input_seq_length={limit}: {too_long} questions have more tokens with their "
            f"template, up to {longest}, which would end the run at its start: set "
            "igrpo.drop_overlong_prompts=true"
        )


def _batch(config: Config) -> int:
    return round(config.grpo.num_prompts_per_step * config.grpo.batch_multiplier)


def _too_long(asked: Questions, limit: int) -> str | None:
    """How many questions are longer, in words; None where none is."""
    count = asked.above(limit)
    if count is None:
        return f"at least {len(asked.longest)}" if asked.longest else "some"
    return str(count) if count else None


def data_notes(
    config: Config, asked: Questions, budget: Context, steps: int | None
) -> Iterator[str]:
    """What is left out, shortened or not known; what batches and checkpoints make of the rest."""
    limit = config.data.max_input_seq_length - budget.template
    if config.igrpo.drop_overlong_prompts and (too_long := _too_long(asked, limit)):
        yield f"{too_long} questions are longer than data.max_input_seq_length and are left out"
    count, batch = usable(config, asked, budget), _batch(config)
    if count is None:
        yield "the number of problems is known when the data is loaded: no steps, no cost of a run"
    if config.feedback.two_stage and budget.clipped > _CLIPPED:
        yield (
            f"{100 * budget.clipped:.0f} % of the drafts are shortened in q' at the assumed "
            "lengths: raise policy.max_total_sequence_length where the model allows it"
        )
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

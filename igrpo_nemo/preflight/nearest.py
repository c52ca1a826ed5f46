"""The nearest setting that fits: the smallest change after which every check and estimate is fine.

shortage -> candidates, the mildest first, one key, then two -> config -> checked and estimated

A candidate sets also what follows from it through the configs' interpolations, so that it is judged
as a run with that override would be.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from igrpo_nemo.config import Config
from igrpo_nemo.config.compose import finished, with_value
from igrpo_nemo.config.machines import parallel
from igrpo_nemo.config.section import at, shown
from igrpo_nemo.errors import UserError

Change = dict[str, Any]
"""Dotted keys and their new values: what a user would type."""

VLLM = "policy.generation.vllm_cfg"
PACKING, DYNAMIC = "policy.sequence_packing", "policy.dynamic_batching"
OPTIMIZER = "policy.megatron_cfg.optimizer"
CONTEXT = "policy.max_total_sequence_length"
_MULTIPLE = 128


def nearest(config: Config, kind: str, fits: Callable[[Config], bool]) -> Change | None:
    """The mildest change of one or two keys for which `fits` holds; None where there is none."""

    def holds(change: Change) -> bool:
        try:
            candidate = changed(config, change)
        except UserError:
            return False
        return fits(candidate)

    ladders = list(_ladders(config, kind))
    pairs = (
        {**a, **b}
        for first, second in itertools.combinations(ladders, 2)
        for a, b in itertools.product(first, second)
    )
    return next(filter(holds, itertools.chain(*ladders, pairs)), None)


def changed(config: Config, change: Mapping[str, Any]) -> Config:
    """The config as a run with these overrides would have it. Raises `UserError` as that would."""
    values = config.to_dict()
    for key, value in {**_follows(config, change), **change}.items():
        values = with_value(values, key.split("."), value)
    return finished(values, {})


def words(change: Mapping[str, Any]) -> str:
    """`set A=1 B=2`, as overrides."""
    return "set " + " ".join(f"{key}={shown(value)}" for key, value in change.items())


def _ladders(config: Config, kind: str) -> Iterator[list[Change]]:
    """Families of changes, the mildest first; inside a family from the nearest value on."""
    policy, spread = config.policy, parallel(config)
    if kind == "vllm":
        now = policy.generation.vllm.get("gpu_memory_utilization", 0.9)
        # Five hundredths up and down: colocated engines may have too much.
        near = [round(now + sign * step * 0.05, 2) for step in range(1, 19) for sign in (1, -1)]
        yield _each(f"{VLLM}.gpu_memory_utilization", [n for n in near if 0.05 <= n <= 0.95])
        now = policy.generation.vllm.get("tensor_parallel_size", 1)
        yield _doubled(f"{VLLM}.tensor_parallel_size", now, config)
        yield _shorter(config)
        return
    megatron = spread.backend == "megatron"
    section = policy.megatron if megatron else policy.dtensor
    if not section.get("activation_checkpointing"):
        yield [{f"{spread.prefix}.activation_checkpointing": True}]
    elif section.get("recompute_granularity", "full") != "full":
        yield [{f"{spread.prefix}.recompute_granularity": "full"}]
    for packs in (PACKING, DYNAMIC):
        yield _each(f"{packs}.train_mb_tokens", _halves(config, packs))
    if megatron:
        if not policy.logprob_chunk_size:
            defer = "policy.megatron_cfg.defer_fp32_logits"
            yield [{"policy.logprob_chunk_size": 1024, defer: True}]
        optimizer = policy.megatron.get("optimizer") or {}
        shards = ("use_distributed_optimizer", "use_precision_aware_optimizer")
        yield [{f"{OPTIMIZER}.{name}": True} for name in shards if not optimizer.get(name)]
    yield _doubled(spread.tensor_key, spread.tensor, config)
    offload: Change = {"policy.dtensor_cfg.cpu_offload": True}
    if megatron:
        offload = {f"{OPTIMIZER}.optimizer_cpu_offload": True}
        offload[f"{OPTIMIZER}.optimizer_offload_fraction"] = 1.0
    yield [offload]
    yield _shorter(config)
    nodes = (2, 3, 4, 5, 8, 9, 16, 17)
    yield _each("cluster.num_nodes", [n for n in nodes if n > config.cluster.num_nodes])


def _each(key: str, values: list[Any]) -> list[Change]:
    return [{key: value} for value in values]


def _halves(config: Config, packs: str) -> list[int]:
    """Halves of the micro-batch's tokens, down to the longest row."""
    values = at(config.to_dict(), packs) or {}
    least, found = config.policy.max_total_sequence_length, []
    tokens = values.get("train_mb_tokens") or 0
    while values.get("enabled") and tokens > least:
        tokens = max(tokens // 2, least)
        found.append(tokens)
    return found


def _doubled(key: str, now: int, config: Config) -> list[Change]:
    sizes = (now * 2**power for power in range(1, 8))
    return _each(key, [size for size in sizes if size <= config.cluster.gpus_per_node])


def _shorter(config: Config) -> list[Change]:
    """Contexts that still hold q, a draft token and a refinement, in steps of an eighth."""
    total = config.policy.max_total_sequence_length
    least = config.data.max_input_seq_length + config.policy.generation.max_new_tokens + 1
    shorter = (total * eighths // 8 // _MULTIPLE * _MULTIPLE for eighths in range(7, 0, -1))
    return _each(CONTEXT, [tokens for tokens in shorter if tokens >= least])


def _follows(config: Config, change: Mapping[str, Any]) -> Change:
    """What the configs' interpolations and derivations make of other keys."""
    policy, values, follows = config.policy, config.to_dict(), {}
    if CONTEXT in change:
        # Packs and vLLM's context that are as long as the context.
        packs = [f"{a}.{b}_mb_tokens" for a in (PACKING, DYNAMIC) for b in ("train", "logprob")]
        for key in (*packs, f"{VLLM}.max_model_len"):
            if at(values, key) == policy.max_total_sequence_length:
                follows[key] = change[CONTEXT]
    spread = parallel(config)
    if spread.tensor_key in change and policy.make_sequence_length_divisible_by == spread.tensor:
        follows["policy.make_sequence_length_divisible_by"] = change[spread.tensor_key]
    key = f"{PACKING}.train_mb_tokens"
    if key in change and policy.sequence_packing.logprob_mb_tokens is not None:
        follows[f"{PACKING}.logprob_mb_tokens"] = change[key]
    return follows

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
from igrpo_nemo.preflight.plan import Kind

Change = dict[str, Any]
"""Dotted keys and their new values: what a user would type."""

VLLM = "policy.generation.vllm_cfg"
PACKING = "policy.sequence_packing"
OPTIMIZER = "policy.megatron_cfg.optimizer"
CONTEXT = "policy.max_total_sequence_length"
_MULTIPLE = 128


def nearest(config: Config, kind: Kind, fits: Callable[[Config], bool]) -> Change | None:
    """The mildest change of one or two keys for which `fits` holds; None where there is none."""
    ladders = [ladder for ladder in map(list, _ladders(config, kind)) if ladder]
    pairs = (
        {**a, **b}
        for first, second in itertools.combinations(ladders, 2)
        for a, b in itertools.product(first, second)
    )
    changes = itertools.chain(itertools.chain.from_iterable(ladders), pairs)
    return next((change for change in changes if _holds(config, change, fits)), None)


def changed(config: Config, change: Mapping[str, Any]) -> Config:
    """The config as a run with these overrides would have it. Raises `UserError` as that would."""
    values = config.to_dict()
    for key, value in {**_follows(config, change), **change}.items():
        values = with_value(values, key.split("."), value)
    return finished(values, {})


def words(change: Mapping[str, Any]) -> str:
    """`set A=1 B=2`, as overrides."""
    return "set " + " ".join(f"{key}={shown(value)}" for key, value in change.items())


def _holds(config: Config, change: Change, fits: Callable[[Config], bool]) -> bool:
    try:
        candidate = changed(config, change)
    except UserError:
        return False
    return fits(candidate)


def _ladders(config: Config, kind: Kind) -> Iterator[Iterator[Change]]:
    """Families of changes, the mildest first; inside a family from the nearest value on."""
    if kind == "training":
        yield _recomputation(config)
        yield _smaller_packs(config, PACKING)
        yield _smaller_packs(config, "policy.dynamic_batching")
        yield _chunks(config)
        yield _sharded_optimizer(config)
        yield _tensor(parallel(config).tensor_key, parallel(config).tensor, config)
        yield _offload(config)
        yield _shorter(config)
        yield _more_nodes(config)
    else:
        yield _utilization(config)
        tensor = config.policy.generation.vllm.get("tensor_parallel_size", 1)
        yield _tensor(f"{VLLM}.tensor_parallel_size", tensor, config)
        yield _shorter(config)


def _recomputation(config: Config) -> Iterator[Change]:
    prefix = parallel(config).prefix
    section = at(config.to_dict(), prefix, {})
    if not section.get("activation_checkpointing"):
        yield {f"{prefix}.activation_checkpointing": True}
    elif section.get("recompute_granularity", "full") != "full":
        yield {f"{prefix}.recompute_granularity": "full"}


def _smaller_packs(config: Config, section: str) -> Iterator[Change]:
    """Halves of the micro-batch's tokens, down to the longest row."""
    values = at(config.to_dict(), section) or {}
    tokens = values.get("train_mb_tokens")
    if not values.get("enabled") or not tokens:
        return
    least = config.policy.max_total_sequence_length
    while tokens > least:
        tokens = max(tokens // 2, least)
        yield {f"{section}.train_mb_tokens": tokens}


def _chunks(config: Config) -> Iterator[Change]:
    if not config.policy.logprob_chunk_size and parallel(config).backend == "megatron":
        yield {
            "policy.logprob_chunk_size": 1024,
            "policy.megatron_cfg.defer_fp32_logits": True,
        }


def _sharded_optimizer(config: Config) -> Iterator[Change]:
    if parallel(config).backend != "megatron":
        return
    optimizer = config.policy.megatron.get("optimizer") or {}
    for name in ("use_distributed_optimizer", "use_precision_aware_optimizer"):
        if not optimizer.get(name):
            yield {f"{OPTIMIZER}.{name}": True}


def _tensor(key: str, now: int, config: Config) -> Iterator[Change]:
    size = 2 * now
    while size <= config.cluster.gpus_per_node:
        yield {key: size}
        size *= 2


def _offload(config: Config) -> Iterator[Change]:
    if parallel(config).backend == "dtensor":
        yield {"policy.dtensor_cfg.cpu_offload": True}
    else:
        yield {
            f"{OPTIMIZER}.optimizer_cpu_offload": True,
            f"{OPTIMIZER}.optimizer_offload_fraction": 1.0,
        }


def _shorter(config: Config) -> Iterator[Change]:
    """Contexts that still hold q, a draft token and a refinement, in steps of an eighth."""
    total = config.policy.max_total_sequence_length
    least = config.data.max_input_seq_length + config.policy.generation.max_new_tokens + 1
    for eighths in range(7, 0, -1):
        tokens = total * eighths // 8 // _MULTIPLE * _MULTIPLE
        if tokens >= least:
            yield {CONTEXT: tokens}


def _more_nodes(config: Config) -> Iterator[Change]:
    for nodes in (2, 3, 4, 5, 8, 9, 16, 17):
        if nodes > config.cluster.num_nodes:
            yield {"cluster.num_nodes": nodes}


def _utilization(config: Config) -> Iterator[Change]:
    """Five hundredths up and down: colocated engines may have too much."""
    now = config.policy.generation.vllm.get("gpu_memory_utilization", 0.9)
    for step in range(1, 19):
        for sign in (1, -1):
            value = round(now + sign * step * 0.05, 2)
            if 0.05 <= value <= 0.95:
                yield {f"{VLLM}.gpu_memory_utilization": value}


def _follows(config: Config, change: Mapping[str, Any]) -> Change:
    """What the configs' interpolations and derivations make of other keys."""
    policy, values, follows = config.policy, config.to_dict(), {}
    if CONTEXT in change:
        # Packs and vLLM's context that are as long as the context.
        sections = (PACKING, "policy.dynamic_batching")
        keys = [f"{each}.{kind}_mb_tokens" for each in sections for kind in ("train", "logprob")]
        for key in (*keys, f"{VLLM}.max_model_len"):
            if at(values, key) == policy.max_total_sequence_length:
                follows[key] = change[CONTEXT]
    spread = parallel(config)
    if spread.tensor_key in change and policy.make_sequence_length_divisible_by == spread.tensor:
        follows["policy.make_sequence_length_divisible_by"] = change[spread.tensor_key]
    key = f"{PACKING}.train_mb_tokens"
    if key in change and policy.sequence_packing.logprob_mb_tokens is not None:
        follows[f"{PACKING}.logprob_mb_tokens"] = change[key]
    return follows

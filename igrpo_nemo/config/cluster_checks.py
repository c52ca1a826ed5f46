"""Checks of engine `nemo_rl` that need the machines: GPUs, parallel sizes, batches, packing, vLLM.

Each message ends with a value that works. Sources: NeMo-RL 0.7.0's `grpo.setup`, `Policy`,
`models/megatron/setup.py`, `models/megatron/data.py`, `VllmGeneration`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from igrpo_nemo.config.derive import largest_divisor
from igrpo_nemo.config.machines import (
    TENSOR,
    generation_parallel,
    machines,
    parallel,
    replicas,
)
from igrpo_nemo.config.schema import Config
from igrpo_nemo.config.section import shown

COLOCATED = "policy.generation.colocated"
VLLM = "policy.generation.vllm_cfg"
MEGATRON = "policy.megatron_cfg"


def cluster_problems(config: Config) -> list[str]:
    """What does not fit the machines; without usable machines the rest is not looked at."""
    problems = [*_backend(config), *_machines(config)]
    if problems:
        return problems
    problems = [*_replica(config)]
    if not problems:
        problems = [*_batch(config)]
    for check in (_packing, _megatron, _dtensor, _generation, _checkpoints):
        problems += check(config)
    return problems


def _backend(config: Config) -> Iterator[str]:
    enabled = [
        bool((cfg or {}).get("enabled"))
        for cfg in (config.policy.megatron_cfg, config.policy.dtensor_cfg)
    ]
    if sum(enabled) != 1:
        works = "dtensor_cfg.enabled=false" if all(enabled) else "megatron_cfg.enabled=true"
        yield (
            "exactly one of policy.megatron_cfg.enabled and policy.dtensor_cfg.enabled is true: "
            f"set policy.{works}"
        )
    backend = config.policy.generation.backend
    if backend not in ("vllm", "sglang", "megatron"):
        yield (
            f"policy.generation.backend={backend} is none of vllm, sglang, megatron: set "
            "policy.generation.backend=vllm"
        )
    if config.igrpo.model is not None:
        yield "igrpo.model is a small built-in model for one machine alone: set igrpo.model=null"


def _machines(config: Config) -> Iterator[str]:
    """`setup()` on `cluster` and `policy.generation.colocated`."""
    nodes, gpus = config.cluster.num_nodes, config.cluster.gpus_per_node
    colocated = config.policy.generation.colocated or {}
    if gpus < 1:
        yield "cluster.gpus_per_node=0: engine nemo_rl trains on GPUs; set cluster.gpus_per_node=8"
        return
    if colocated.get("enabled", True):
        return
    resources = colocated.get("resources") or {}
    share, key = resources.get("gpus_per_node"), f"{COLOCATED}.resources"
    if nodes == 1:
        if not share or share >= gpus:
            several = f"{key}.gpus_per_node={gpus // 2}"
            yield (
                f"no GPU is left for training: {key}.gpus_per_node={shown(share)} of one node's "
                f"{gpus} generate; set {several if gpus > 1 else f'{COLOCATED}.enabled=true'}"
            )
        elif resources.get("num_nodes") not in (None, 1):
            yield (
                f"{key}.num_nodes={resources['num_nodes']}, but the cluster has one node: set "
                f"{key}.num_nodes=1"
            )
        return
    count = resources.get("num_nodes") or 0
    if not 0 < count < nodes:
        left = "no GPU is left for training" if count >= nodes else "no GPU is left to generate"
        yield (
            f"{left}: {key}.num_nodes={shown(resources.get('num_nodes'))} of "
            f"cluster.num_nodes={nodes}; set {key}.num_nodes=1"
        )
    elif share != gpus:
        yield (
            f"{key}.gpus_per_node={shown(share)}, but with several nodes whole ones generate: "
            f"set {key}.gpus_per_node={gpus}"
        )


def _replica(config: Config) -> Iterator[str]:
    spread, world = parallel(config), machines(config).training
    if world % spread.replica == 0:
        return
    rest = spread.pipeline * spread.context
    message = f"{world} training GPUs are no multiple of the {spread.replica} of one model replica"
    if world % rest == 0:
        works = largest_divisor(world // rest, spread.tensor)
        yield f"{message}: set {spread.tensor_key}={works}"
    elif world % (spread.tensor * spread.context) == 0:
        yield f"{message}: set {MEGATRON}.pipeline_model_parallel_size=1"
    else:
        yield f"{message}: set {spread.prefix}.context_parallel_size=1"


def _batch(config: Config) -> Iterator[str]:
    policy, igrpo = config.policy, config.igrpo
    count, batch = replicas(config), policy.train_global_batch_size
    rows = config.grpo.num_generations_per_prompt
    if batch % count:
        updates = igrpo.updates_per_rollout
        step = _smallest_multiple(count * updates, rows)
        problems = max(round(config.grpo.num_prompts_per_step / step), 1) * step
        yield (
            f"policy.train_global_batch_size={batch} is no multiple of the {count} data-parallel "
            f"replicas: set grpo.num_prompts_per_step={problems}"
        )
        return
    micro, packed = policy.train_micro_batch_size, policy.sequence_packing.enabled
    dynamic = policy.dynamic.get("enabled")
    if not packed and not dynamic and (batch // count) % micro:
        yield (
            f"policy.train_micro_batch_size={micro} does not divide the {batch // count} rows of a "
            f"replica: set policy.train_micro_batch_size={largest_divisor(batch // count, micro)}"
        )
    # NeMo-RL: batch-variant kernels make log-probs of the two passes differ from TP 4 on.
    if parallel(config).tensor >= 4 and not config.loss_fn.force_on_policy_ratio:
        if policy.logprob_batch_size != micro:
            yield (
                f"policy.logprob_batch_size={shown(policy.logprob_batch_size)}: tensor parallelism "
                f"of 4 and more needs policy.train_micro_batch_size's {micro}; set "
                f"policy.logprob_batch_size={micro}"
            )


def _smallest_multiple(of: int, rows: int) -> int:
    """The smallest number of problems whose trained rows are a multiple of `of`."""
    return next(n for n in range(1, of + 1) if n * rows % of == 0)


def _packing(config: Config) -> Iterator[str]:
    policy, spread = config.policy, parallel(config)
    packing, dynamic = policy.sequence_packing, policy.dynamic
    total = policy.max_total_sequence_length
    if packing.enabled and dynamic.get("enabled"):
        yield (
            "policy.sequence_packing and policy.dynamic_batching exclude each other: set "
            "policy.dynamic_batching.enabled=false"
        )
    if dynamic.get("enabled") and spread.pipeline > 1:
        yield (
            "policy.dynamic_batching does not go with pipeline parallelism: set "
            "policy.dynamic_batching.enabled=false"
        )
    sections: list[tuple[str, dict[str, Any]]] = []
    if packing.enabled:
        sections.append(("policy.sequence_packing", packing.model_dump()))
    if dynamic.get("enabled"):
        sections.append(("policy.dynamic_batching", dynamic))
    for section, values in sections:
        for name in ("train_mb_tokens", "logprob_mb_tokens"):
            tokens = values.get(name)
            same = name == "logprob_mb_tokens" and tokens == values.get("train_mb_tokens")
            if tokens is not None and tokens < total and not same:
                yield (
                    f"{section}.{name}={tokens} cannot hold the longest row, "
                    f"policy.max_total_sequence_length={total}: set {section}.{name}={total}"
                )
    if (policy.draft or {}).get("enabled") and (packing.enabled or spread.backend == "dtensor"):
        yield (
            "policy.draft, a speculative-decoding model, needs Megatron without packed rows: set "
            "policy.draft.enabled=false"
        )


def _megatron(config: Config) -> Iterator[str]:
    spread, policy = parallel(config), config.policy
    if spread.backend != "megatron":
        return
    megatron = policy.megatron
    if spread.sequence and spread.tensor == 1:
        yield (
            f"{MEGATRON}.sequence_parallel=true splits over tensor parallel ranks, and there is "
            f"one: set {MEGATRON}.sequence_parallel=false"
        )
    if spread.context > 1 and not policy.sequence_packing.enabled:
        yield (
            f"{MEGATRON}.context_parallel_size={spread.context} needs packed rows: set "
            f"{MEGATRON}.context_parallel_size=1"
        )
    factor = (2 * spread.context if spread.context > 1 else 1) * (
        spread.tensor if spread.tensor > 1 and spread.sequence else 1
    )
    multiple = policy.make_sequence_length_divisible_by or 1
    if policy.sequence_packing.enabled and multiple % factor:
        yield (
            f"policy.make_sequence_length_divisible_by={multiple} is no multiple of the {factor} "
            f"parts of a row: set policy.make_sequence_length_divisible_by={factor}"
        )
    if policy.logprob_chunk_size and not megatron.get("defer_fp32_logits"):
        yield (
            f"policy.logprob_chunk_size={policy.logprob_chunk_size} converts logits in chunks: set "
            f"{MEGATRON}.defer_fp32_logits=true"
        )
    optimizer = megatron.get("optimizer") or {}
    if optimizer.get("optimizer_cpu_offload") and optimizer.get("optimizer_offload_fraction") != 1:
        yield (
            f"{MEGATRON}.optimizer.optimizer_cpu_offload=true offloads all or nothing: set "
            f"{MEGATRON}.optimizer.optimizer_offload_fraction=1.0"
        )
    half = policy.precision == "bfloat16"
    aware = optimizer.get("use_precision_aware_optimizer")
    if half and aware and not optimizer.get("bf16"):
        yield (
            f"{MEGATRON}.optimizer.use_precision_aware_optimizer=true under policy.precision="
            f"bfloat16: set {MEGATRON}.optimizer.bf16=true"
        )
    if not half and optimizer.get("bf16"):
        yield f"policy.precision=float32 with bf16 weights: set {MEGATRON}.optimizer.bf16=false"
    if aware and not optimizer.get("use_distributed_optimizer"):
        yield (
            f"{MEGATRON}.optimizer.use_precision_aware_optimizer=true shards its state: set "
            f"{MEGATRON}.optimizer.use_distributed_optimizer=true"
        )


def _dtensor(config: Config) -> Iterator[str]:
    spread = parallel(config)
    if spread.backend != "dtensor" or spread.context == 1:
        return
    key = f"{spread.prefix}.context_parallel_size"
    if config.policy.sequence_packing.enabled:
        yield f"{key}={spread.context} does not go with packed rows under DTensor: set {key}=1"
    elif spread.sequence and spread.tensor > 1:
        yield f"{key}={spread.context} does not go with sequence parallelism: set {key}=1"


def _generation(config: Config) -> Iterator[str]:
    generation = config.policy.generation
    if generation.backend != "vllm":
        return
    vllm = generation.vllm
    world, replica = machines(config).generation, generation_parallel(config)
    pipeline = vllm.get("pipeline_parallel_size", 1)
    if world % replica:
        if world % pipeline:
            yield (
                f"{world} generation GPUs are no multiple of {VLLM}.pipeline_parallel_size="
                f"{pipeline}: set {VLLM}.pipeline_parallel_size=1"
            )
        else:
            works = largest_divisor(world // pipeline, vllm.get(TENSOR, 1))
            yield (
                f"{world} generation GPUs are no multiple of the {replica} of one vLLM engine: set "
                f"{VLLM}.{TENSOR}={works}"
            )
    if pipeline > 1 and not vllm.get("async_engine"):
        yield (
            f"{VLLM}.pipeline_parallel_size={pipeline} needs the asynchronous engine: set "
            f"{VLLM}.async_engine=true"
        )
    expert, tensor = vllm.get("expert_parallel_size", 1), vllm.get(TENSOR, 1)
    if expert > 1 and expert % tensor:
        yield (
            f"{VLLM}.expert_parallel_size={expert} is no multiple of {VLLM}.{TENSOR}={tensor}: set "
            f"{VLLM}.expert_parallel_size=1"
        )
    total, length = config.policy.max_total_sequence_length, vllm.get("max_model_len")
    if length is not None and length < total:
        yield (
            f"{VLLM}.max_model_len={length} is less than policy.max_total_sequence_length={total}, "
            f"so q' and its refinement do not fit: set {VLLM}.max_model_len={total}"
        )
    fp8 = vllm.get("precision") == "fp8"
    if str(vllm.get("kv_cache_dtype", "auto")).startswith("fp8") and not fp8:
        yield (
            f"{VLLM}.kv_cache_dtype={vllm['kv_cache_dtype']} needs fp8 weights: set "
            f"{VLLM}.kv_cache_dtype=auto"
        )
    if fp8 and not config.loss_fn.use_importance_sampling_correction:
        yield (
            f"{VLLM}.precision=fp8 samples from other weights than those trained: set "
            "loss_fn.use_importance_sampling_correction=true"
        )


def _checkpoints(config: Config) -> Iterator[str]:
    """`Policy.save_checkpoint`, which a run reaches at its first save."""
    saved, dtensor = config.checkpointing, config.policy.dtensor
    if not saved.enabled:
        return
    key = "checkpointing.model_save_format"
    # NeMo-RL reads `_v2` with Megatron too.
    if dtensor.get("_v2") and saved.model_save_format not in ("safetensors", "torch_save"):
        yield (
            f"{key}={shown(saved.model_save_format)} with policy.dtensor_cfg._v2=true is none of "
            f"safetensors, torch_save: set {key}=safetensors"
        )
    elif not dtensor.get("_v2") and saved.model_save_format is not None:
        yield (
            f"{key}={saved.model_save_format} is for policy.dtensor_cfg._v2=true alone, without it "
            f"NeMo-RL refuses to save: set {key}=null"
        )

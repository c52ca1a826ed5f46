"""Memory of one GPU under engine `nemo_rl`: what training takes, and what vLLM has for its cache.

    training: weights + gradients + optimizer shard        what stays
              + layer inputs kept for recomputation        one micro-batch
              + max(one layer's working set, logits)       they are not there at the same time
              + context, NCCL                              and a reserve
    vLLM:     gpu_memory_utilization x memory - weights - one forward pass - context and graphs
              = cache; / (bytes per token x tokens + recurrent state) = sequences at once

Training follows Korthikanti et al. (arXiv 2205.05198), for gated and grouped-query layers; for the
loss NeMo-RL 0.7.0's `distributed/model_utils.py` and `loss/wrapper.py`. vLLM's defaults are those
of 0.20 (`EngineArgs.get_batch_defaults`, `SchedulerConfig`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from igrpo_nemo.config import Config
from igrpo_nemo.config.machines import (
    Parallel,
    generation_parallel,
    low_rank,
    machines,
    parallel,
    replicas,
)
from igrpo_nemo.preflight.shape import (
    BF16,
    FP32,
    Shape,
    adapter_parameters,
    kv_bytes_per_token,
    padded_vocab,
    rank_parameters,
    state_bytes_per_sequence,
)

GIB = 2**30


@dataclass(frozen=True, slots=True)
class GPU:
    """One GPU: bytes, bytes a second, bf16 operations a second; `gpus.yaml` has the figures."""

    name: str
    memory: int
    bandwidth: float
    bf16_flops: float
    scheduled: Sequence[int]


GPUS: dict[str, GPU] = {
    kind: GPU(**{**facts, "memory": round(facts["memory"] * GIB)})
    for kind, facts in yaml.safe_load(Path(__file__).with_name("gpus.yaml").read_text()).items()
}
"""By the values of `igrpo.site.gpu`."""

CUDA_CONTEXT = round(0.6 * GIB)
"""Driver context, kernels and cuBLAS workspaces of a process. An allowance, not a measurement, as
are the next three."""
NCCL_BUFFERS = round(1.4 * GIB)
"""Channels of the process groups of one rank: data, tensor, refit."""
CUDA_GRAPHS = round(0.9 * GIB)
"""Decoding graphs of vLLM's usual batch sizes; none with `enforce_eager`."""
TRAINER_ASLEEP = round(1.5 * GIB)
"""What a colocated trainer leaves on the GPU while vLLM generates: its context."""

CHUNK_BYTES = 24
"""A vocabulary entry of a chunk of log-probs: fp32 logits and softmax, an int64 one-hot and its
product (`ChunkedDistributedLogprob.backward`)."""
UNCHUNKED_BYTES = 28
"""The same for all tokens at once, beside the bf16 logits (`DistributedLogprob`)."""
DTENSOR_LOGIT_BYTES = 18
"""A logit under FSDP2: bf16, its fp32 copy, log-softmax, and the gradients of the last two."""

_ASYNC_DEFAULTS = (2048, 128)
"""Tokens and sequences of a step of vLLM's asynchronous engine, where `vllm_kwargs` name none."""


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes on the fullest training GPU."""

    weights: int
    gradients: int
    optimizer: int
    layer_inputs: int
    working_set: int
    logits: int
    overhead: int
    tokens: int

    @property
    def total(self) -> int:
        stays = self.weights + self.gradients + self.optimizer + self.overhead
        return stays + self.layer_inputs + max(self.working_set, self.logits)


def training_memory(config: Config, shape: Shape) -> TrainingMemory:
    """The estimate of a config whose checks passed."""
    spread, number = parallel(config), _number(config)
    t, p = spread.tensor, spread.pipeline
    tokens = math.ceil(micro_batch_tokens(config) / spread.context)
    depth, sharded = math.ceil(shape.depth / p), t if spread.sequence else 1
    kept = _kept_by_layers(shape, tokens, t, sharded, number)
    if (again := recomputed(config)) == "full":
        inputs = depth * number * tokens * shape.hidden // sharded
    else:
        inputs = sum(kept[kind] * count for kind, count in _layers(shape).items())
        inputs = inputs * depth // shape.depth
        if again == "mlp":
            channels = shape.mlp_channels * tokens * number // t
            inputs -= shape.mlp_layers * depth // shape.depth * channels
    # One layer being recomputed and differentiated: what it keeps, the gradients of that, and the
    # gathered input and its gradient. A recomputed Qwen2 layer is attention and feed-forward.
    together = shape.attention_layers == shape.mlp_layers == shape.depth
    largest = max(kept.values())
    working_set = (sum(kept.values()) if together else largest) + largest
    working_set += 2 * number * tokens * shape.hidden
    if spread.backend == "megatron":
        held, logits = _megatron(config, shape, spread), _logits(config, shape, t, tokens)
    else:
        held, logits = _fsdp(config, shape, t), DTENSOR_LOGIT_BYTES * tokens * shape.vocab // t
    # The first of p stages holds the micro-batches of all p; only the last has logits.
    if p > 1 and p * inputs + working_set > inputs + max(working_set, logits):
        inputs, logits = p * inputs, 0
    overhead = CUDA_CONTEXT + NCCL_BUFFERS
    return TrainingMemory(*held, inputs, working_set, logits, overhead, tokens)


def trained_parameters(config: Config, shape: Shape) -> int:
    """All of the model's, or those of its adapters."""
    if config.igrpo.engine == "nemo_rl" and (adapters := low_rank(config)):
        return adapter_parameters(shape, adapters, parallel(config).backend)
    return shape.parameters


def micro_batch_tokens(config: Config) -> int:
    """Tokens of the largest micro-batch: a full pack, or rows padded to the context."""
    policy = config.policy
    if policy.sequence_packing.enabled:
        return policy.sequence_packing.train_mb_tokens
    if policy.dynamic.get("enabled"):
        return policy.dynamic.get("train_mb_tokens", policy.max_total_sequence_length)
    return policy.train_micro_batch_size * policy.max_total_sequence_length


def recomputed(config: Config) -> str:
    """What of a layer is computed again in the backward pass: `full`, `mlp`, or nothing."""
    megatron, dtensor = config.policy.megatron, config.policy.dtensor
    if parallel(config).backend == "dtensor":
        again = "full" if dtensor.get("_v2") else "mlp"
        return again if dtensor.get("activation_checkpointing") else ""
    if not megatron.get("activation_checkpointing"):
        return ""
    if megatron.get("recompute_granularity", "full") == "full":
        return "full"
    return "mlp" if "mlp" in (megatron.get("recompute_modules") or ()) else ""


def _number(config: Config) -> int:
    return BF16 if config.policy.precision == "bfloat16" else FP32


def _layers(shape: Shape) -> dict[str, int]:
    kinds = {
        "attention": shape.attention_layers,
        "mlp": shape.mlp_layers,
        "mamba": shape.mamba_layers,
    }
    return {kind: count for kind, count in kinds.items() if count}


def _kept_by_layers(
    shape: Shape, tokens: int, tensor: int, sharded: int, number: int
) -> dict[str, int]:
    """Bytes of a layer's forward pass that its backward pass reads, by its kind. No scores: flash
    attention."""
    # q, k, v before and behind the rotation, the output, and the log-sum-exps in fp32.
    attention = 3 * shape.q_size + 3 * shape.kv_size + shape.heads * FP32 // number
    inner = {"attention": attention, "mlp": shape.mlp_channels}
    if (mamba := shape.mamba) is not None:
        # Projection, convolution, scan output and gated norm; a state per chunk in fp32.
        inner["mamba"] = 4 * mamba.inner + 2 * mamba.conv + mamba.heads
        inner["mamba"] += mamba.inner * mamba.state * FP32 // number // mamba.chunk
    around = 3 * shape.hidden // sharded  # input, norm, output or residual
    return {kind: number * tokens * (around + inner[kind] // tensor) for kind in _layers(shape)}


def _megatron(config: Config, shape: Shape, spread: Parallel) -> tuple[int, int, int]:
    """Weights, gradients, and Adam's state. Precision-aware: moments in fp32 and the 16 bits that
    bf16 weights lack (`store_param_remainders`); otherwise fp32 weights, moments and a copy of the
    gradient."""
    megatron, number = config.policy.megatron, _number(config)
    optimizer = megatron.get("optimizer") or {}
    ddp = megatron.get("distributed_data_parallel_config") or {}
    held = trained = rank_parameters(shape, spread.tensor, spread.pipeline)
    if adapters := low_rank(config):
        trained = math.ceil(adapter_parameters(shape, adapters, "megatron") / spread.pipeline)
        held += trained
    if number == FP32:
        each = 2 * FP32
    else:
        aware = optimizer.get("use_precision_aware_optimizer")
        each = 2 + 2 * FP32 if aware else 4 * FP32
    shards = replicas(config) * spread.context if optimizer.get("use_distributed_optimizer") else 1
    state = 0 if optimizer.get("optimizer_cpu_offload") else math.ceil(each * trained / shards)
    return number * held, (FP32 if ddp.get("grad_reduce_in_fp32") else number) * trained, state


def _logits(config: Config, shape: Shape, tensor: int, tokens: int) -> int:
    """The head's output and the loss under Megatron-Core. Packed rows are sliced from the logits
    one by one, and each slice's gradient is as large as the whole: logits, their gradient, and the
    one being added."""
    vocabulary = padded_vocab(shape, tensor) // tensor
    element = BF16 if config.policy.megatron.get("defer_fp32_logits") else FP32
    copies = 3 if config.policy.sequence_packing.enabled else 2
    if chunk := config.policy.logprob_chunk_size:
        return vocabulary * (copies * element * tokens + CHUNK_BYTES * min(chunk, tokens))
    return vocabulary * tokens * (copies * element + UNCHUNKED_BYTES)


def _fsdp(config: Config, shape: Shape, tensor: int) -> tuple[int, int, int]:
    """FSDP2: fp32 weights, gradients and moments in shards over all GPUs; layers gathered."""
    dtensor, number = config.policy.dtensor, _number(config)
    # `dp_replicate_size` copies of the shards, under HSDP.
    shards = machines(config).training // int(dtensor.get("dp_replicate_size") or 1)
    adapters, layer = low_rank(config), shape.matrices // shape.depth
    held, trained, differentiated = shape.parameters, shape.parameters, layer
    if adapters:
        trained = adapter_parameters(shape, adapters, "dtensor")
        held, differentiated = held + trained, trained // shape.depth
    weights, shard = (math.ceil(FP32 * count / shards) for count in (held, trained))
    if dtensor.get("cpu_offload"):
        weights, shard = 0, 0
    # Two layers (one being fetched) and the tables, which stay gathered, with fp32 gradients.
    gathered = (2 * layer + shape.tables) * number + differentiated * FP32
    return weights + gathered // tensor, shard, 2 * shard


@dataclass(frozen=True, slots=True)
class VllmMemory:
    """Bytes on one generation GPU; `max_num_seqs` is the scheduler's limit of an engine."""

    budget: int
    weights: int
    forward: int
    overhead: int
    kv_per_token: int
    state_per_sequence: int
    max_model_len: int
    max_num_seqs: int
    tensor: int

    @property
    def cache(self) -> int:
        """Bytes left for keys, values and recurrent states; negative where nothing is."""
        return self.budget - self.weights - self.forward - self.overhead

    def sequence(self, tokens: float) -> float:
        """Cache bytes of one sequence of this many tokens."""
        return self.kv_per_token * tokens + self.state_per_sequence

    def fitting(self, tokens: float) -> int:
        """Sequences of this many tokens that the cache holds."""
        return max(0, int(self.cache / self.sequence(tokens)))

    def at_once(self, tokens: float) -> int:
        """Sequences of this many tokens that one engine decodes at a time."""
        return min(self.max_num_seqs, self.fitting(tokens))


def vllm_memory(config: Config, shape: Shape, gpu: GPU) -> VllmMemory:
    """The estimate of a config whose checks passed."""
    vllm = config.policy.generation.vllm
    kwargs: dict[str, Any] = config.policy.generation.vllm_kwargs or {}
    tensor, pipeline = vllm.get("tensor_parallel_size", 1), vllm.get("pipeline_parallel_size", 1)
    weight = 1 if vllm.get("precision") == "fp8" else BF16
    cache = 1 if str(vllm.get("kv_cache_dtype", "auto")).startswith("fp8") else BF16
    tokens, sequences = _ASYNC_DEFAULTS if vllm.get("async_engine") else gpu.scheduled
    tokens = kwargs.get("max_num_batched_tokens", tokens)
    sequences = kwargs.get("max_num_seqs", sequences)
    # The profiled forward pass: the widest layer's activations, and logits in fp32 with the
    # sampler's copies.
    widest = max(shape.mlp_channels, shape.q_size)
    if shape.mamba is not None:
        widest = max(widest, 2 * (shape.mamba.inner + shape.mamba.conv))
    activations = BF16 * tokens * (widest // tensor + 4 * shape.hidden)
    state = kwargs.get("mamba_ssm_cache_dtype", vllm.get("mamba_ssm_cache_dtype", "auto"))
    state = state_bytes_per_sequence(shape, tensor, FP32 if state == "float32" else BF16)
    return VllmMemory(
        budget=int(vllm.get("gpu_memory_utilization", 0.9) * gpu.memory),
        weights=math.ceil(weight * shape.parameters / (tensor * pipeline)),
        forward=activations + 3 * FP32 * sequences * shape.vocab,
        overhead=CUDA_CONTEXT + (0 if vllm.get("enforce_eager") else CUDA_GRAPHS),
        kv_per_token=math.ceil(kv_bytes_per_token(shape, tensor, cache) / pipeline),
        state_per_sequence=math.ceil(state / pipeline),
        max_model_len=vllm.get("max_model_len") or config.policy.max_total_sequence_length,
        max_num_seqs=sequences,
        tensor=tensor,
    )


def engines(config: Config) -> int:
    """vLLM engines of the run."""
    return max(1, machines(config).generation // generation_parallel(config))

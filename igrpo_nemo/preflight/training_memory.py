"""Memory of one training GPU under engine `nemo_rl`: Megatron-Core or DTensor (FSDP2).

    weights + gradients + optimizer shard        what stays
    + layer inputs kept for recomputation        one micro-batch
    + max(one layer's working set, logits)       they are not there at the same time
    + context, NCCL, a reserve

Follows Korthikanti et al. (arXiv 2205.05198), for gated and grouped-query layers; for the loss
NeMo-RL 0.7.0's `distributed/model_utils.py` and `loss/wrapper.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from igrpo_nemo.config import Config
from igrpo_nemo.config.machines import Parallel, low_rank, machines, parallel, replicas
from igrpo_nemo.preflight.capacity import CUDA_CONTEXT, NCCL_BUFFERS
from igrpo_nemo.preflight.shape import (
    BF16,
    FP32,
    Shape,
    adapter_parameters,
    counts,
    padded_vocab,
    rank_parameters,
)

CHUNK_BYTES = 24
"""A vocabulary entry of a chunk of log-probs: fp32 logits and softmax, an int64 one-hot and its
product (`ChunkedDistributedLogprob.backward`)."""
UNCHUNKED_BYTES = 28
"""The same for all tokens at once, beside the bf16 logits (`DistributedLogprob`)."""
DTENSOR_LOGIT_BYTES = 18
"""A logit under FSDP2: bf16, its fp32 copy, log-softmax, and the gradients of the last two."""


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
    def static(self) -> int:
        """What is there whatever the micro-batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.static + self.layer_inputs + max(self.working_set, self.logits) + self.overhead


def training_memory(config: Config, shape: Shape) -> TrainingMemory:
    """The estimate of a config whose checks passed."""
    spread = parallel(config)
    if spread.backend == "megatron":
        return _megatron(config, shape, spread)
    return _dtensor(config, shape, spread)


def trained_parameters(config: Config, shape: Shape) -> int:
    """All of the model's, or those of its adapters."""
    if config.igrpo.engine == "nemo_rl" and (adapters := low_rank(config)):
        return adapter_parameters(shape, adapters, parallel(config).backend)
    return counts(shape).total


def micro_batch_tokens(config: Config) -> int:
    """Tokens of the largest micro-batch: a full pack, or rows padded to the context."""
    policy = config.policy
    dynamic = policy.dynamic
    if policy.sequence_packing.enabled:
        return policy.sequence_packing.train_mb_tokens
    if dynamic.get("enabled"):
        return dynamic.get("train_mb_tokens", policy.max_total_sequence_length)
    return policy.train_micro_batch_size * policy.max_total_sequence_length


def _megatron(config: Config, shape: Shape, spread: Parallel) -> TrainingMemory:
    megatron = config.policy.megatron
    t, p = spread.tensor, spread.pipeline
    parameters = rank_parameters(shape, t, p)
    half = config.policy.precision == "bfloat16"
    in_fp32 = (megatron.get("distributed_data_parallel_config") or {}).get("grad_reduce_in_fp32")
    number = BF16 if half else FP32
    trained = parameters
    if adapters := low_rank(config):
        trained = math.ceil(adapter_parameters(shape, adapters, "megatron") / p)
        parameters += trained
    tokens = math.ceil(micro_batch_tokens(config) / spread.context)
    sharded = t if spread.sequence else 1
    depth = math.ceil(shape.depth / p)
    inputs = _layer_inputs(shape, tokens, depth, sharded, megatron, number)
    working_set = _working_set(shape, tokens, t, sharded, number)
    logits = _megatron_logits(config, shape, spread, tokens)
    # The first of p stages holds the micro-batches of all p; only the last has logits.
    if p > 1 and p * inputs + working_set > inputs + max(working_set, logits):
        inputs, logits = p * inputs, 0
    return TrainingMemory(
        weights=number * parameters,
        gradients=(FP32 if in_fp32 or not half else BF16) * trained,
        optimizer=_megatron_optimizer(config, megatron, trained, half),
        layer_inputs=inputs,
        working_set=working_set,
        logits=logits,
        overhead=CUDA_CONTEXT + NCCL_BUFFERS,
        tokens=tokens,
    )


def _megatron_optimizer(
    config: Config, megatron: dict[str, Any], parameters: int, half: bool
) -> int:
    """Adam's state. Precision-aware: moments in fp32 and the 16 bits that bf16 weights lack
    (`store_param_remainders`); otherwise fp32 weights, moments and a copy of the gradient."""
    optimizer = megatron.get("optimizer") or {}
    if optimizer.get("optimizer_cpu_offload"):
        return 0
    if not half:
        each = 2 * FP32
    elif optimizer.get("use_precision_aware_optimizer"):
        each = 2 + 2 * FP32
    else:
        each = 4 * FP32
    if not optimizer.get("use_distributed_optimizer"):
        return each * parameters
    shards = replicas(config) * parallel(config).context
    return math.ceil(each * parameters / shards)


def _layer_inputs(
    shape: Shape, tokens: int, depth: int, sharded: int, megatron: dict[str, Any], number: int
) -> int:
    """What the forward pass keeps of every layer: its input alone, or all that backward reads."""
    if megatron.get("activation_checkpointing"):
        if megatron.get("recompute_granularity", "full") == "full":
            return depth * number * tokens * shape.hidden // sharded
    tensor = megatron.get("tensor_model_parallel_size", 1)
    kept = sum(
        count * _kept(shape, kind, tokens, tensor, sharded, number)
        for kind, count in _layers(shape).items()
    )
    kept = kept * depth // shape.depth
    modules = megatron.get("recompute_modules") or ["core_attn"]
    if megatron.get("activation_checkpointing") and "mlp" in modules:
        hidden = _mlp_channels(shape) * tokens * number // tensor
        kept -= shape.mlp_layers * depth // shape.depth * hidden
    return kept


def _layers(shape: Shape) -> dict[str, int]:
    kinds = {
        "attention": shape.attention_layers,
        "mlp": shape.mlp_layers,
        "mamba": shape.mamba_layers,
    }
    return {kind: count for kind, count in kinds.items() if count}


def _mlp_channels(shape: Shape) -> int:
    """Channels that a feed-forward layer keeps between its matrices: gate, up and their product."""
    return (3 if shape.gated_mlp else 2) * shape.intermediate


def _kept(shape: Shape, kind: str, tokens: int, tensor: int, sharded: int, number: int) -> int:
    """Bytes of a layer's forward pass that its backward pass reads. No scores: flash attention."""
    around = 3 * shape.hidden // sharded  # input, norm, output or residual
    if kind == "attention":
        # q, k, v before and behind the rotation, the output, and the log-sum-exps in fp32.
        inner = 2 * (shape.q_size + shape.kv_size) + shape.kv_size + shape.q_size
        inner += shape.heads * FP32 // number
    elif kind == "mlp":
        inner = _mlp_channels(shape)
    else:
        mamba = shape.mamba
        assert mamba is not None
        # Projection, convolution, scan output and gated norm; a state per chunk in fp32.
        inner = 2 * mamba.inner + 2 * mamba.conv + 2 * mamba.inner + mamba.heads
        inner += mamba.inner * mamba.state * FP32 // number // mamba.chunk
    return number * tokens * (around + inner // tensor)


def _working_set(shape: Shape, tokens: int, tensor: int, sharded: int, number: int) -> int:
    """One layer being recomputed and differentiated: what it keeps, the gradients of that, and the
    gathered input and its gradient. A recomputed Qwen2 layer is attention and feed-forward."""
    each = {kind: _kept(shape, kind, tokens, tensor, sharded, number) for kind in _layers(shape)}
    together = shape.attention_layers == shape.mlp_layers == shape.depth
    kept = sum(each.values()) if together else max(each.values())
    gradients = max(each.values())
    gathered = 2 * number * tokens * shape.hidden
    return kept + gradients + gathered


def _megatron_logits(config: Config, shape: Shape, spread: Parallel, tokens: int) -> int:
    """The head's output and the loss. Packed rows are sliced from the logits one by one, and each
    slice's gradient is as large as the whole: logits, their gradient, and the one being added."""
    megatron = config.policy.megatron
    vocabulary = padded_vocab(shape, spread.tensor) // spread.tensor
    element = BF16 if megatron.get("defer_fp32_logits") else FP32
    copies = 3 if config.policy.sequence_packing.enabled else 2
    chunk = config.policy.logprob_chunk_size
    if chunk:
        return vocabulary * (copies * element * tokens + CHUNK_BYTES * min(chunk, tokens))
    return vocabulary * tokens * (copies * element + UNCHUNKED_BYTES)


def _dtensor(config: Config, shape: Shape, spread: Parallel) -> TrainingMemory:
    """FSDP2: fp32 weights, gradients, moments in shards over all GPUs; layers gathered in bf16."""
    dtensor = config.policy.dtensor
    number = BF16 if config.policy.precision == "bfloat16" else FP32
    world, c = machines(config).training, counts(shape)
    # `dp_replicate_size` copies of the shards, under HSDP.
    shards = world // int(dtensor.get("dp_replicate_size") or 1)
    offloaded = bool(dtensor.get("cpu_offload"))
    adapters = low_rank(config)
    trained = adapter_parameters(shape, adapters, "dtensor") if adapters else c.total
    held = c.total + (trained if adapters else 0)
    weights, shard = (
        0 if offloaded else math.ceil(FP32 * count / shards) for count in (held, trained)
    )
    t = spread.tensor
    tokens = math.ceil(micro_batch_tokens(config) / spread.context)
    # Two layers (one being fetched) and the tables, which stay gathered, with fp32 gradients.
    layer = c.layers // shape.depth
    differentiated = trained // shape.depth if adapters else layer
    gathered = (2 * layer * number + differentiated * FP32 + (c.embedding + c.head) * number) // t
    sharded = t if spread.sequence else 1
    recomputed = bool(dtensor.get("activation_checkpointing"))
    fields = {
        "activation_checkpointing": recomputed,
        # Version 1 recomputes the feed-forward layers alone.
        "recompute_granularity": "full" if dtensor.get("_v2") else "selective",
        "recompute_modules": ["mlp"],
        "tensor_model_parallel_size": t,
    }
    return TrainingMemory(
        weights=weights + gathered,
        gradients=shard,
        optimizer=2 * shard,
        layer_inputs=_layer_inputs(shape, tokens, shape.depth, sharded, fields, number),
        working_set=_working_set(shape, tokens, t, sharded, number),
        logits=DTENSOR_LOGIT_BYTES * tokens * shape.vocab // t,
        overhead=CUDA_CONTEXT + NCCL_BUFFERS,
        tokens=tokens,
    )

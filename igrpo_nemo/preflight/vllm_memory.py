"""Memory of one generation GPU under vLLM: what is left for the cache, and how much fits in it.

gpu_memory_utilization x memory - weights - one forward pass - context and graphs = cache
cache / (bytes per token x tokens of q' and refinement + recurrent state) = sequences at once

Defaults are vLLM 0.20's (`EngineArgs.get_batch_defaults`, `SchedulerConfig`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from igrpo_nemo.config import Config
from igrpo_nemo.config.machines import generation_parallel, machines
from igrpo_nemo.preflight.capacity import CUDA_CONTEXT, GIB, GPU
from igrpo_nemo.preflight.shape import (
    BF16,
    FP32,
    Shape,
    counts,
    kv_bytes_per_token,
    state_bytes_per_sequence,
)

CUDA_GRAPHS = round(0.9 * GIB)
"""Decoding graphs of vLLM's usual batch sizes; none with `enforce_eager`. An allowance."""
TRAINER_ASLEEP = round(1.5 * GIB)
"""What a colocated trainer leaves on the GPU while vLLM generates: its context. An allowance."""

_ASYNC_DEFAULTS = (2048, 128)
"""Tokens and sequences of a step of the asynchronous engine, where `vllm_kwargs` name none."""


@dataclass(frozen=True, slots=True)
class VllmMemory:
    """Bytes on one generation GPU; `sequences` are limits per engine.

    `fitting` sequences of the full context, `max_num_seqs` the scheduler's limit.
    """

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

    def at_once(self, tokens: float) -> int:
        """Sequences of this many tokens that one engine decodes at a time."""
        return max(0, min(self.max_num_seqs, self.fitting(tokens)))

    def fitting(self, tokens: float) -> int:
        """Sequences of this many tokens that the cache holds."""
        return max(0, int(self.cache / self.sequence(tokens)))


def vllm_memory(config: Config, shape: Shape, gpu: GPU) -> VllmMemory:
    """The estimate of a config whose checks passed."""
    vllm = config.policy.generation.vllm
    kwargs: dict[str, Any] = config.policy.generation.vllm_kwargs or {}
    tensor, pipeline = vllm.get("tensor_parallel_size", 1), vllm.get("pipeline_parallel_size", 1)
    weight = 1 if vllm.get("precision") == "fp8" else BF16
    cache = 1 if str(vllm.get("kv_cache_dtype", "auto")).startswith("fp8") else BF16
    tokens, sequences = _scheduler(vllm, kwargs, gpu)
    state = kwargs.get("mamba_ssm_cache_dtype", vllm.get("mamba_ssm_cache_dtype", "auto"))
    return VllmMemory(
        budget=int(vllm.get("gpu_memory_utilization", 0.9) * gpu.memory),
        weights=math.ceil(weight * counts(shape).total / (tensor * pipeline)),
        forward=_forward(shape, tokens, sequences, tensor),
        overhead=CUDA_CONTEXT + (0 if vllm.get("enforce_eager") else CUDA_GRAPHS),
        kv_per_token=math.ceil(kv_bytes_per_token(shape, tensor, cache) / pipeline),
        state_per_sequence=math.ceil(
            state_bytes_per_sequence(shape, tensor, FP32 if state == "float32" else BF16) / pipeline
        ),
        max_model_len=vllm.get("max_model_len") or config.policy.max_total_sequence_length,
        max_num_seqs=sequences,
        tensor=tensor,
    )


def engines(config: Config) -> int:
    """vLLM engines of the run."""
    return max(1, machines(config).generation // generation_parallel(config))


def _scheduler(vllm: dict[str, Any], kwargs: dict[str, Any], gpu: GPU) -> tuple[int, int]:
    """Tokens and sequences of a scheduler step at most."""
    tokens, sequences = _ASYNC_DEFAULTS if vllm.get("async_engine") else gpu.scheduled
    return kwargs.get("max_num_batched_tokens", tokens), kwargs.get("max_num_seqs", sequences)


def _forward(shape: Shape, tokens: int, sequences: int, tensor: int) -> int:
    """The profiled forward pass: the widest layer's activations, and logits in fp32 with the
    sampler's copies."""
    widest = max((3 if shape.gated_mlp else 2) * shape.intermediate, shape.q_size) // tensor
    if shape.mamba is not None:
        widest = max(widest, 2 * (shape.mamba.inner + shape.mamba.conv) // tensor)
    activations = BF16 * tokens * (widest + 4 * shape.hidden)
    return activations + 3 * FP32 * sequences * shape.vocab

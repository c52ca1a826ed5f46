"""Memory of training and of vLLM: against sums by hand."""

from __future__ import annotations

import pytest
from cases import cases
from composed import config_of

from igrpo_nemo.config import Config
from igrpo_nemo.preflight.memory import (
    CHUNK_BYTES,
    GIB,
    GPUS,
    TrainingMemory,
    VllmMemory,
    micro_batch_tokens,
    training_memory,
    vllm_memory,
)
from igrpo_nemo.preflight.shape import Shape, shape_of

CASES = cases(__file__)


B7 = ["model=deepseek_r1_distill_qwen_7b", "data=math", "engine=nemo_rl", "cluster=a100_2x8"]
MEGATRON = "policy.megatron_cfg"
TENSOR = f"{MEGATRON}.tensor_model_parallel_size"


def loaded(*overrides: str) -> tuple[Config, Shape]:
    config = config_of(*B7, *overrides)
    shape = shape_of(config, {})
    assert shape is not None
    return config, shape


def training(*overrides: str) -> TrainingMemory:
    return training_memory(*loaded(*overrides))


def vllm(*overrides: str) -> VllmMemory:
    config, shape = loaded(*overrides)
    return vllm_memory(config, shape, GPUS[config.igrpo.site.gpu])


def test_megatrons_static_memory_by_hand():
    """TP 2, DP 4: bf16 weights and gradients, 10 bytes of Adam a parameter over 4 shards."""
    memory, half = training(), loaded()[1].parameters / 2
    assert memory.weights == pytest.approx(2 * half, rel=0.001)
    assert memory.gradients == memory.weights
    assert memory.optimizer == pytest.approx(10 * half / 4, rel=0.001)
    assert memory.tokens == 9728
    assert memory.layer_inputs == 28 * 9728 * 3584 * 2 // 2
    chunk = CHUNK_BYTES * 1024
    assert memory.logits == 76_032 * (3 * 2 * 9728 + chunk)


@pytest.mark.parametrize(("change", "part", "factor"), CASES["changes"])
def test_what_changes_a_part_of_the_memory(change, part, factor):
    before, after = getattr(training(), part), getattr(training(*change), part)
    assert after == pytest.approx(factor * before, rel=0.002)


def test_recomputation_and_chunks_save_memory():
    kept = training(f"{MEGATRON}.activation_checkpointing=false")
    selective = training(
        f"{MEGATRON}.recompute_granularity=selective", f"{MEGATRON}.recompute_modules=[mlp]"
    )
    full = training()
    assert full.layer_inputs < selective.layer_inputs < kept.layer_inputs
    whole = training("policy.logprob_chunk_size=null")
    assert whole.logits > 3 * full.logits
    assert training(f"{MEGATRON}.optimizer.optimizer_cpu_offload=true").optimizer == 0


def test_fsdp_shards_sixteen_bytes_over_all_gpus():
    config, shape = loaded("model=deepseek_r1_distill_qwen_7b_dtensor")
    memory, total = training_memory(config, shape), shape.parameters
    assert memory.gradients + memory.optimizer == pytest.approx(12 * total / 8, rel=0.001)
    assert memory.weights > 4 * total / 8


def test_tokens_of_a_micro_batch():
    packed = config_of(*B7)
    assert micro_batch_tokens(packed) == packed.policy.sequence_packing.train_mb_tokens
    padded = config_of(*B7, "model=nemotron_h_8b", "policy.train_micro_batch_size=2")
    assert micro_batch_tokens(padded) == 2 * 8192
    dynamic = config_of(*B7, "model=nemotron_h_8b_dtensor")
    assert micro_batch_tokens(dynamic) == 8192


def test_a_full_context_is_at_once_what_the_cache_holds():
    memory = vllm()
    assert memory.kv_per_token == 57_344
    cache = memory.budget - memory.weights - memory.forward - memory.overhead
    assert memory.cache == cache > 45 * GIB
    assert memory.fitting(9728) == cache // (57_344 * 9728)
    assert memory.at_once(1) == memory.max_num_seqs == 128  # the scheduler's own limit


def test_vllm_settings_that_change_the_cache():
    assert vllm("policy.generation.vllm_cfg.gpu_memory_utilization=0.5").cache < vllm().cache
    assert vllm("policy.generation.vllm_cfg.tensor_parallel_size=2").weights == pytest.approx(
        vllm().weights / 2, rel=0.001
    )
    assert vllm("policy.generation.vllm_kwargs.max_num_seqs=512").max_num_seqs == 512
    assert vllm("policy.generation.vllm_cfg.async_engine=false").max_num_seqs == 256
    hybrid = vllm("model=nemotron_h_8b")
    assert hybrid.state_per_sequence > 100 * 10**6
    assert hybrid.sequence(100) == hybrid.state_per_sequence + 100 * hybrid.kv_per_token

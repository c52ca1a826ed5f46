"""Fifty broken configs: each is refused in one line that names the key and a value that works.

Each case is an experiment, the overrides that break it, and the override that its message offers in
their place or beside them, after which the run must be accepted.
"""

from __future__ import annotations

import pytest
from composed import PLENTY, config_of, made

from igrpo_nemo.cli import main
from igrpo_nemo.errors import UserError
from igrpo_nemo.preflight import preflight

B7, B14, HYBRID = (
    "tableS3_igrpo",
    "table1_openmath_nemotron_14b_igrpo",
    "table1_nemotron_h_8b_igrpo",
)
MEGATRON, VLLM = "policy.megatron_cfg", "policy.generation.vllm_cfg"
COLOCATED = "policy.generation.colocated"
TENSOR = f"{MEGATRON}.tensor_model_parallel_size"
TIS = "loss_fn.truncated_importance_sampling"

WRONG_TYPES = [
    (B14, ["grpo.num_prompts_per_step=many"], "grpo.num_prompts_per_step=128"),
    (B14, ["igrpo.num_drafts=2.5"], "igrpo.num_drafts=4"),
    (B14, ["policy.precision=fp8"], "policy.precision=bfloat16"),
    (B14, ["igrpo.draft_choice=bset"], "igrpo.draft_choice=best"),
    (B14, ["data.shuffle=sometimes"], "data.shuffle=true"),
    (B14, ["policy.max_grad_norm=tight"], "policy.max_grad_norm=1.0"),
    (B14, ["policy.generation.top_p=1.5"], "policy.generation.top_p=1.0"),
    (B14, [f"{MEGATRON}.context_parallel_size=two"], f"{MEGATRON}.context_parallel_size=1"),
    (B14, [f"{VLLM}.gpu_memory_utilization=1.7"], f"{VLLM}.gpu_memory_utilization=0.85"),
    (B7, [f"{MEGATRON}.recompute_granularity=some"], f"{MEGATRON}.recompute_granularity=full"),
    (B7, ["data.max_input_seq_length=short"], "data.max_input_seq_length=1024"),
]

MISSPELT = [
    (B14, ["grpo.num_prompt_per_step=64"], "grpo.num_prompts_per_step"),
    (B14, ["igrpo.num_draft=4"], "igrpo.num_drafts"),
    (B14, ["policy.generation.temprature=0.7"], "policy.generation.temperature"),
    (B14, ["loss_fn.ratio_clip_mn=0.2"], "loss_fn.ratio_clip_min"),
    (B14, ["checkpointing.save_priod=5"], "checkpointing.save_period"),
    (B14, ["igrpo.preflight.respone_share=0.3"], "igrpo.preflight.response_share"),
    (B14, [f"{MEGATRON}.tensor_parallel_size=4"], TENSOR),
    (B14, [f"{VLLM}.gpu_memory_utilisation=0.8"], f"{VLLM}.gpu_memory_utilization"),
]

INDIVISIBLE = [
    (B14, ["igrpo.num_drafts=3"], "igrpo.budget=null"),
    (B14, ["igrpo.updates_per_rollout=3"], "igrpo.updates_per_rollout=2"),
    (B14, ["policy.train_global_batch_size=100"], "policy.train_global_batch_size=64"),
    (B14, ["grpo.num_prompts_per_step=125"], "grpo.num_prompts_per_step=124"),
    (B14, [f"{TENSOR}=3"], f"{TENSOR}=2"),
    (B7, [f"{TENSOR}=8"], f"{TENSOR}=4"),
    (B14, [f"{VLLM}.tensor_parallel_size=3"], f"{VLLM}.tensor_parallel_size=2"),
    (B7, [f"{VLLM}.tensor_parallel_size=8"], f"{VLLM}.tensor_parallel_size=4"),
    (
        B14,
        [f"{MEGATRON}.pipeline_model_parallel_size=3"],
        f"{MEGATRON}.pipeline_model_parallel_size=1",
    ),
    (
        B7,
        [f"{MEGATRON}.pipeline_model_parallel_size=8", f"{TENSOR}=1"]
        + [f"{MEGATRON}.sequence_parallel=false"],
        f"{MEGATRON}.pipeline_model_parallel_size=4",
    ),
    (
        B14,
        ["policy.make_sequence_length_divisible_by=3"],
        "policy.make_sequence_length_divisible_by=4",
    ),
    (HYBRID, ["policy.train_micro_batch_size=3"], "policy.train_micro_batch_size=2"),
]

IMPOSSIBLE_CONTEXTS = [
    (HYBRID, ["policy.max_total_sequence_length=9728"], "policy.max_total_sequence_length=8192"),
    (B14, ["policy.max_total_sequence_length=5000"], "policy.max_total_sequence_length=9728"),
    (B14, ["policy.max_total_sequence_length=5120"], "policy.max_total_sequence_length=9728"),
    (B14, [f"{VLLM}.max_model_len=4096"], f"{VLLM}.max_model_len=9728"),
    (
        B14,
        ["policy.sequence_packing.train_mb_tokens=4096"],
        "policy.sequence_packing.train_mb_tokens=9728",
    ),
    (B7, ["igrpo.drop_overlong_prompts=false"], "igrpo.drop_overlong_prompts=true"),
    (B7, [f"{VLLM}.gpu_memory_utilization=0.2"], f"{VLLM}.gpu_memory_utilization=0.25"),
    (B14, [f"{TENSOR}=1", f"{MEGATRON}.sequence_parallel=false"], f"{TENSOR}=2"),
]

CONTRADICTORY = [
    (B14, ["policy.dtensor_cfg.enabled=true"], "policy.dtensor_cfg.enabled=false"),
    (B14, [f"{MEGATRON}.enabled=false"], f"{MEGATRON}.enabled=true"),
    (B14, ["policy.dynamic_batching.enabled=true"], "policy.dynamic_batching.enabled=false"),
    (HYBRID, ["policy.sequence_packing.enabled=true"], "policy.sequence_packing.enabled=false"),
    (B14, ["policy.generation.top_p=0.9"], "igrpo.entropy.exact=false"),
    (B14, ["policy.logprob_batch_size=4"], "policy.logprob_batch_size=1"),
    (B7, ["cluster.num_nodes=1"], f"{COLOCATED}.resources.gpus_per_node=4"),
    (B7, [f"{COLOCATED}.resources.num_nodes=2"], f"{COLOCATED}.resources.num_nodes=1"),
    (B7, [f"{COLOCATED}.resources.gpus_per_node=4"], f"{COLOCATED}.resources.gpus_per_node=8"),
    (B7, [f"{TENSOR}=1"], f"{MEGATRON}.sequence_parallel=false"),
    (
        B7,
        ["grpo.async_grpo.enabled=true"],
        "loss_fn.use_importance_sampling_correction=true",
    ),
    (
        "table2_gspo_igrpo",
        ["loss_fn.force_on_policy_ratio=true"],
        "loss_fn.force_on_policy_ratio=false",
    ),
    ("table2_gspo_igrpo", ["loss_fn.token_level_loss=true"], "loss_fn.token_level_loss=false"),
    (B7, ["loss_fn.use_cispo=true"], "loss_fn.token_level_loss=true"),
    (
        B7,
        [f"{TIS}_type=tis", "loss_fn.use_importance_sampling_correction=true"],
        f"{TIS}_ratio=2.0",
    ),
    (B7, [f"{MEGATRON}.defer_fp32_logits=false"], f"{MEGATRON}.defer_fp32_logits=true"),
    (
        B7,
        [f"{MEGATRON}.optimizer.optimizer_cpu_offload=true"],
        f"{MEGATRON}.optimizer.optimizer_offload_fraction=1.0",
    ),
    (
        B7,
        ["loss_fn.reference_policy_kl_penalty=0.1"],
        "grpo.skip_reference_policy_logprobs_calculation=false",
    ),
    ("table2_dapo", ["grpo.reward_scaling.source_max=1.0"], "grpo.reward_scaling.source_max=2.0"),
    (B7, ["grpo.max_rollout_turns=3"], "grpo.max_rollout_turns=1"),
    (B7, [f"{VLLM}.kv_cache_dtype=fp8"], f"{VLLM}.kv_cache_dtype=auto"),
    (B7, ["on_policy_distillation.enabled=true"], "on_policy_distillation.enabled=false"),
    (B7, ["igrpo.val_temperature=1.0"], "igrpo.val_temperature=0.6"),
    (B7, ["igrpo.advantage_delta=0.0"], "igrpo.advantage_delta=1e-06"),
    (B7, ["checkpointing.metric_name=accuracy"], "checkpointing.metric_name=val:accuracy"),
]

REPAIRED = WRONG_TYPES + INDIVISIBLE + IMPOSSIBLE_CONTEXTS + CONTRADICTORY


def refusals(experiment: str, overrides: list[str]) -> list[str]:
    try:
        config = made(f"experiment={experiment}", *overrides)
        return preflight(config, environ={}, free=lambda folder: PLENTY).problems
    except UserError as error:
        return [str(error)]


def test_there_are_fifty():
    cases = [str(overrides) for _, overrides, _ in REPAIRED + MISSPELT]
    assert len(cases) == len(set(cases)) >= 50


@pytest.mark.parametrize(
    ("experiment", "overrides", "works"), REPAIRED, ids=[f"{c[1][0]}" for c in REPAIRED]
)
def test_a_broken_config_is_refused_with_a_value_that_works(experiment, overrides, works):
    [message] = refusals(experiment, overrides)
    assert "\n" not in message and len(message) < 400
    assert overrides[0].partition("=")[0] in message or works.partition("=")[0] in message
    assert works in message
    key = works.partition("=")[0]
    kept = [text for text in overrides if text.partition("=")[0] != key]
    assert refusals(experiment, [*kept, works]) == []


@pytest.mark.parametrize(
    ("experiment", "overrides", "meant"), MISSPELT, ids=[f"{c[1][0]}" for c in MISSPELT]
)
def test_a_misspelt_key_is_refused_with_the_one_that_was_meant(experiment, overrides, meant):
    [message] = refusals(experiment, overrides)
    wrong, _, value = overrides[0].partition("=")
    assert message == f"unknown key {wrong}: did you mean {meant}?"
    assert refusals(experiment, [f"{meant}={value}"]) == []


def test_the_command_says_so_and_exits_with_1(capsys):
    assert main(["preflight", f"experiment={B14}", f"{TENSOR}=3"]) == 1
    assert f"set {TENSOR}=2" in capsys.readouterr().out


def test_a_laptop_is_no_cluster():
    [message] = preflight(config_of(f"experiment={B7}", "cluster=laptop")).problems
    assert message.endswith("engine nemo_rl trains on GPUs: set cluster=a100_2x8")
    assert preflight(config_of(f"experiment={B7}", "cluster=a100_2x8")).fits


def test_a_config_that_does_not_compose_is_bad_input(capsys):
    assert main(["preflight", f"experiment={B14}", "grpo.num_prompts_per_step=many"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: grpo.num_prompts_per_step='many' should be")

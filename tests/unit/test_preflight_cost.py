"""The roofline: decoding against closed forms, lengths against their definition, both methods."""

from __future__ import annotations

import json
import random

import pytest
from cases import cases
from composed import config_of

from igrpo_nemo.preflight import preflight
from igrpo_nemo.preflight.cost import Cost, PromptGroup, Speed, decode_seconds, other_method
from igrpo_nemo.preflight.shape import forward_flops
from igrpo_nemo.preflight.tokens import KNOWN, context, questions, responses

CASES = cases(__file__)


B7 = ["model=deepseek_r1_distill_qwen_7b", "data=math", "engine=nemo_rl", "cluster=a100_2x8"]


def speed(**values: float) -> Speed:
    """A step costs one second, and one more for each running sequence; caches are free."""
    plain = {"weights": 1, "per_token": 0, "per_sequence": 1, "bandwidth": 1, "flops": 0}
    plain |= {"flops_per_s": 1, "overhead": 0, "places": 100}
    return Speed(**plain | values)  # type: ignore[arg-type]


PLAIN = speed()


def test_a_batch_shrinks_as_sequences_end():
    """Lengths 1, 2, 4: three steps' worth of running sequences is 1 x 3, 1 x 2, 2 x 1."""
    group = PromptGroup(5, (1, 2, 4), prefill=0.0)
    assert decode_seconds([group], PLAIN) == 4 * 1 + (3 + 2 + 1 + 1)


def test_refinements_wait_for_their_own_drafts_alone():
    second = PromptGroup(5, (3,), prefill=0.0)
    quick, slow = PromptGroup(5, (1, 2), 0.0, second), PromptGroup(5, (10,), 0.0)
    # 2 + 3 steps of the first problem run beside the 10 of the other: 10 steps in all.
    assert decode_seconds([quick, slow], PLAIN) == 10 + (1 + 2) + 3 + 10
    assert decode_seconds([quick], PLAIN) == 5 + (1 + 2) + 3


def test_a_full_engine_makes_others_wait():
    for places, seconds in ((1, 7), (2, 4)):
        full = speed(per_sequence=0, places=places)
        assert decode_seconds([PromptGroup(0, (3, 4), 0.0)], full) == seconds


def test_caches_prefill_overhead_and_arithmetic_cost_time():
    cache = speed(weights=0, per_token=1, per_sequence=0)
    # Tokens read: the prompt in each of 4 steps, and half of the own ones (in continuous time).
    assert decode_seconds([PromptGroup(10, (4,), 0.0)], cache) == 4 * (10 + 4 / 2)
    assert decode_seconds([PromptGroup(0, (4,), prefill=2.5)], PLAIN) == 2.5 + 8
    busy = speed(per_sequence=0, flops=6, flops_per_s=2, overhead=0.5)
    assert decode_seconds([PromptGroup(0, (4, 4), 0.0)], busy) == 4 * (0.5 + 6)


def test_assumed_lengths_have_the_assumed_mean():
    lengths = responses(config_of(*B7, "igrpo.preflight.response_share=0.3"))
    rng = random.Random(1)
    drawn = [lengths.draw(rng) for _ in range(20_000)]
    assert sum(drawn) / len(drawn) == pytest.approx(0.3 * 4096, rel=0.02)
    assert max(drawn) == 4096
    cut = sum(length == 4096 for length in drawn) / len(drawn)
    assert cut == pytest.approx(lengths.above(4096), abs=0.005)

    constant = responses(config_of(*B7, "igrpo.preflight.response_sigma=0"))
    assert constant.draw(rng) == round(0.4 * 4096) and constant.above(100) == 1.0


def test_the_draft_gets_what_q_and_the_refinement_leave():
    config = config_of(*B7, "model=nemotron_h_8b")
    budget = context(config, questions(config, {}))
    assert budget.draft_room[0.5] == 8192 - 4096 - budget.question[0.5] - 12
    assert 0.05 < budget.clipped < 0.15
    assert budget.question[1.0] == 1024  # longer questions are left out
    wide = config_of(*B7)
    assert context(wide, questions(wide, {})).clipped == 0
    assert context(wide, KNOWN["gsm8k"]).mean_question < budget.mean_question


def costs(*overrides: str) -> tuple[Cost, Cost]:
    """GRPO's and iGRPO's."""
    plan = preflight(config_of(*B7, *overrides), environ={})
    assert plan.cost is not None and plan.other is not None
    return plan.other, plan.cost


def test_both_methods_at_the_same_budget():
    grpo, igrpo = costs()
    assert grpo.sampled_tokens == pytest.approx(igrpo.sampled_tokens, rel=0.03)
    # Two stages, each as long as its longest completion; half the rows, with a draft in front.
    assert 1.5 < igrpo.generation / grpo.generation < 2.2
    assert 0.9 < igrpo.trained_tokens / grpo.trained_tokens < 1.1
    assert igrpo.gpu_hours / grpo.gpu_hours > 1.1
    assert igrpo.gpus == 16 and igrpo.steps == 58


def test_the_other_method_changes_the_method_alone():
    config = config_of(*B7, "feedback=none")
    other = other_method(config)
    assert (other.igrpo.num_drafts, other.igrpo.num_refinements) == (4, 4)
    assert other_method(other).igrpo == config.igrpo
    assert other.policy == config.policy


@pytest.mark.parametrize("feedback", ["critique", "self_verification", "exemplar"])
def test_grpo_beside_any_feedback_has_its_budget_and_none_of_its_options(feedback):
    config = config_of("experiment=demo", f"feedback={feedback}")
    other = other_method(config)
    assert other.feedback.num_trained == config.igrpo.budget == 8
    assert other.igrpo.feedback_options == {}


def test_each_prompt_of_stage_2_is_prefilled():
    """One for each answer under critique; its completions are as many as elsewhere."""
    equal = [*B7, "igrpo.preflight.response_sigma=0"]
    costs = [
        preflight(config_of(*equal, *change), environ={}).cost
        for change in ([], ["feedback=critique"], ["feedback=none"])
    ]
    best_draft, critique, grpo = (cost.prefill for cost in costs if cost)
    assert critique - grpo == pytest.approx(4 * (best_draft - grpo))


def test_either_method_shows_the_same_two_costs():
    two = preflight(config_of(*B7), environ={})
    one = preflight(config_of(*B7, "feedback=none"), environ={})
    assert one.ratio == pytest.approx(two.ratio)
    assert one.cost == two.other and two.cost == one.other


def test_training_time_is_arithmetic_over_the_stated_share_of_the_peak():
    """Forward, backward twice, and recomputation: four forward passes on eight A100 at 40 %."""
    plan = preflight(config_of(*B7, "igrpo.preflight.response_sigma=0"), environ={})
    assert plan.cost is not None and plan.shape is not None and plan.context is not None
    row = plan.cost.trained_tokens / 512
    assert row == round(plan.context.mean_question) + 12 + 2 * 1638
    flops = 4 * 512 * forward_flops(plan.shape, row)
    assert plan.cost.training == pytest.approx(flops / (8 * 312e12 * 0.4))


@pytest.mark.parametrize(("change", "part", "direction"), CASES["what_changes_the_cost"])
def test_what_changes_the_cost(change, part, direction):
    before, after = getattr(costs()[1], part), getattr(costs(*change)[1], part)
    assert (after - before) * direction > 0


def test_asynchronous_training_hides_the_shorter_part():
    config = [
        *B7,
        "grpo.async_grpo.enabled=true",
        "loss_fn.use_importance_sampling_correction=true",
    ]
    cost = preflight(config_of(*config), environ={}).cost
    assert cost is not None
    assert cost.step == cost.refit + max(cost.generation, cost.logprobs + cost.training)


FIELDS = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "intermediate_size", "vocab_size"),
    "max_position_embeddings",
)
LLAMA_8B = ("llama", 4096, 32, 32, 8, 128, 14336, 128256, 131072)
QWEN3_32B = ("qwen3", 5120, 64, 64, 8, 128, 25600, 151936, 40960)
PUBLISHED = [
    # model, nodes, asynchronous, mean tokens of a completion and of a prompt, seconds of a step
    (LLAMA_8B, 2, False, 1019, 128, 92.8),
    (LLAMA_8B, 2, True, 1123, 128, 64.8),
    (QWEN3_32B, 4, False, 3251, 103, 376.0),
    (QWEN3_32B, 8, True, 3252, 103, 200.0),
]
"""The dense bf16 runs on H100 of docs/about/performance-summary.md in NeMo-RL v0.5.0: 64 problems
of 32 completions; the prompt's tokens follow from the page's tokens a second."""


@pytest.mark.parametrize(("model", "nodes", "asynchronous", "mean", "prompt", "seconds"), PUBLISHED)
def test_published_step_times(tmp_path, model, nodes, asynchronous, mean, prompt, seconds):
    """The recipes of `examples/configs/recipes/llm/performance`: a KL term, so two log-prob passes;
    TP 1 and PP 2 (1 asynchronous) with recomputation for 8B, TP 4 and PP 4 without for 32B."""
    (tmp_path / "config.json").write_text(json.dumps(dict(zip(FIELDS, model, strict=True))))
    problems = tmp_path / "problems.jsonl"
    row = {"problem": "x" * round(2.8 * (prompt - 13)), "answer": "1"}
    problems.write_text(64 * f"{json.dumps(row)}\n")
    large = model is QWEN3_32B
    tensor, pipeline = (4, 4) if large else (1, 1 if asynchronous else 2)
    megatron, vllm = "policy.megatron_cfg", "policy.generation.vllm_cfg"
    overrides = [
        *["engine=nemo_rl", "cluster=h100_2x8", "feedback=none", "data=jsonl"],
        *[f"data.{part}.data_path={problems}" for part in ("train", "validation")],
        *["igrpo.prompt.system=''", "igrpo.budget=32", "grpo.num_prompts_per_step=64"],
        *["data.max_input_seq_length=128", "policy.generation.max_new_tokens=3968"],
        "policy.max_total_sequence_length=4096",
        f"igrpo.preflight.response_share={mean / 3968}",
        *[f"policy.model_name={tmp_path}", f"cluster.num_nodes={nodes}"],
        f"{megatron}.tensor_model_parallel_size={tensor}",
        f"{megatron}.pipeline_model_parallel_size={pipeline}",
        f"{megatron}.sequence_parallel={str(large).lower()}",
        f"{megatron}.activation_checkpointing={str(not large).lower()}",
        f"{vllm}.tensor_parallel_size={tensor}",
        f"{vllm}.async_engine={str(asynchronous).lower()}",
        f"{vllm}.gpu_memory_utilization={0.8 if asynchronous else 0.6}",
        "loss_fn.reference_policy_kl_penalty=0.01",
        "grpo.skip_reference_policy_logprobs_calculation=false",
    ]
    if asynchronous:
        overrides += ["grpo.async_grpo.enabled=true"]
        overrides += ["loss_fn.use_importance_sampling_correction=true"]
        overrides += [f"policy.generation.colocated.resources.num_nodes={nodes // 2}"]
    else:
        overrides += ["policy.generation.colocated={enabled: true}"]
    plan = preflight(config_of(*overrides), environ={})
    assert plan.cost is not None and plan.cost.gpus == 8 * nodes
    assert plan.cost.trained_tokens / 2048 == pytest.approx(mean + prompt, rel=0.02)
    assert plan.cost.step == pytest.approx(seconds, rel=0.15)


def test_a_time_limit_becomes_a_chain():
    plan = preflight(config_of(*B7, "igrpo.site.time=01:00:00"), environ={})
    assert plan.cost is not None
    jobs = -(-plan.cost.hours * 3600 // (3600 - 900))  # beside igrpo.site.save_margin_s
    assert f"about {jobs:.0f} jobs of 01:00:00: igrpo launch --chain {jobs:.0f}" in plan.notes

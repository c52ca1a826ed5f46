"""The paper's experiments as configs: what each is, and that its values are the paper's."""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from cases import cases
from composed import CONFIGS, GROUPS, config_of

from igrpo_nemo.config import Config, RolloutBudget, rollout_steps, with_problems
from igrpo_nemo.config.nemo_schema import keys_beyond, nemo_schema
from igrpo_nemo.config.section import at as config_at
from igrpo_nemo.evaluation.systems import published_results
from igrpo_nemo.run.problems import expected_problems

CASES = cases(__file__)


MODELS = {
    "nemotron_h_8b": "nvidia/Nemotron-H-8B-Base-8K",
    "deepseek_r1_distill_qwen_7b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "deepseek_r1_distill_qwen_14b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B",
    "openmath_nemotron_7b": "nvidia/OpenMath-Nemotron-7B",
    "openmath_nemotron_14b": "nvidia/OpenMath-Nemotron-14B",
    "openreasoning_nemotron_7b": "nvidia/OpenReasoning-Nemotron-7B",
}
TABLE_1 = [m for m in MODELS if m != "openreasoning_nemotron_7b"]
PAIRS = [
    *((f"table1_{model}_igrpo", f"table1_{model}_grpo") for model in TABLE_1),
    ("figure2_openreasoning_nemotron_7b_igrpo", "figure2_openreasoning_nemotron_7b_grpo"),
    ("table2_dapo_igrpo", "table2_dapo"),
    ("table2_gspo_igrpo", "table2_gspo"),
    ("tableS3_igrpo", "tableS3_grpo"),
]
"""iGRPO and what it is compared with."""
BASELINES = [f"table1_{m}_{name}" for m in TABLE_1 for name in ("self_verification", "critique")]
ALONE = [
    *BASELINES,
    "table3_judge",
    "tableS1_openmath_nemotron_14b_igrpo",
    *(f"tableS4_beta_{beta}" for beta in ("0", "1e-4", "1e-3", "1e-2")),
    *(f"tableS4_completions_{count}" for count in (4, 8, 16, 32)),
    "literal_deepseek_r1_distill_qwen_7b_igrpo",
]
EXPERIMENTS = [*(name for pair in PAIRS for name in pair), *ALONE]
SEVEN = "table1_deepseek_r1_distill_qwen_7b_igrpo"
FOURTEEN = "table1_openmath_nemotron_14b_igrpo"


@cache
def composed(experiment: str, *overrides: str) -> Config:
    """An experiment with what follows from the number of its problems."""
    config = config_of(f"experiment={experiment}", *overrides)
    problems = expected_problems(config)
    assert problems is not None
    return with_problems(config, problems)


def at(config: Config, key: str) -> Any:
    return config_at(config.to_dict(), key)


def test_every_run_of_the_paper_has_a_file():
    assert sorted(EXPERIMENTS) == sorted(
        set(GROUPS["experiment"]) - {"demo", "demo_grpo", "laptop"}
    )


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_names_its_run_folder_and_its_machines(experiment):
    config = composed(experiment)
    assert config.logger.log_dir == f"runs/{experiment}"
    assert config.igrpo.engine == "nemo_rl"
    nodes = 5 if "14b" in experiment else 2
    assert (config.cluster.num_nodes, config.cluster.gpus_per_node) == (nodes, 8)
    assert config.igrpo.site.gpu == "a100_80gb"
    colocated = {"enabled": False, "resources": {"gpus_per_node": 8, "num_nodes": 1}}
    assert config.policy.generation.colocated == colocated


NEEDED_WITHOUT_ANNOTATION = {
    "policy.offload_optimizer_for_logprob",
    "policy.megatron_cfg.moe_router_dtype",
    "policy.megatron_cfg.moe_router_load_balancing_type",
    "policy.megatron_cfg.moe_router_bias_update_rate",
    "policy.megatron_cfg.moe_permute_fusion",
}
"""NeMo-RL's Megatron setup fails without these, though its types leave them out."""
HYBRID_ALONE = {"policy.generation.vllm_cfg.enable_prefix_caching"}
"""Where NeMo-RL's vLLM worker reads it; without it prefix caching is on."""


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_has_no_key_that_nemo_rl_does_not_annotate(experiment):
    schema = nemo_schema()
    extra = keys_beyond(composed(experiment).to_dict(), schema.annotated | schema.open)
    hybrid = HYBRID_ALONE if "nemotron_h" in experiment else set()
    assert set(extra) == NEEDED_WITHOUT_ANNOTATION | hybrid
    assert set(extra) <= schema.used


@pytest.mark.parametrize("model", MODELS)
def test_a_dtensor_alternative_differs_in_the_backend_alone(model):
    base = ["engine=nemo_rl", "cluster=a100_5x8"]
    megatron = config_of(*base, f"model={model}")
    dtensor = config_of(*base, f"model={model}_dtensor")
    assert megatron.policy.model_name == dtensor.policy.model_name == MODELS[model]
    assert megatron.igrpo == dtensor.igrpo
    backends = [
        (at(config, "policy.megatron_cfg.enabled"), at(config, "policy.dtensor_cfg.enabled"))
        for config in (megatron, dtensor)
    ]
    assert backends == [(True, False), (False, True)]
    changed = {
        key
        for key, value in dtensor.policy.model_dump().items()
        if value != megatron.policy.model_dump()[key]
    }
    expected = {"megatron_cfg", "dtensor_cfg", "make_sequence_length_divisible_by"}
    assert changed <= expected | ({"dynamic_batching"} if model == "nemotron_h_8b" else set())


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
def test_a_comparison_differs_in_the_feedback_alone(pair):
    ours, baseline = map(composed, pair)
    budgets = [RolloutBudget(config, expected_problems(config)) for config in (ours, baseline)]
    assert budgets[0].completions == budgets[1].completions == 1024
    assert budgets[0].steps == budgets[1].steps
    assert budgets[0].updates == budgets[1].updates
    assert (ours.igrpo.feedback, baseline.igrpo.feedback) == ("best_draft", "none")
    for section in ("loss_fn", "data", "env", "cluster"):
        assert getattr(ours, section) == getattr(baseline, section)
    left = {"feedback", "train_stages"}
    assert ours.igrpo.model_dump(exclude=left) == baseline.igrpo.model_dump(exclude=left)
    batch = {"train_global_batch_size"}
    assert ours.policy.model_dump(exclude=batch) == baseline.policy.model_dump(exclude=batch)


ROWS = [
    (experiment, *row)
    for experiment, rows in yaml.safe_load(
        Path(__file__).with_name("paper_values.yaml").read_text(encoding="utf-8")
    ).items()
    for row in rows
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[1]}-{row[3]}-{row[4]}")
def test_a_value_of_the_paper(row):
    experiment, _, _, key, value, decision = row
    found = at(composed(experiment), key)
    assert found == (pytest.approx(value) if isinstance(value, float) else value)
    assert type(found) is type(value)
    if decision is not None:
        assert decision in decisions()


@cache
def decisions() -> dict[int, str]:
    """The numbered rows of docs/method.md."""
    text = (CONFIGS.parent / "docs" / "method.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", text, flags=re.MULTILINE)
    return {int(number): question for number, question in rows}


@pytest.mark.parametrize("experiment", BASELINES)
def test_a_baseline_differs_from_igrpo_in_what_its_method_is(experiment):
    model, _, method = experiment.removeprefix("table1_").partition("b_")
    igrpo = composed(f"table1_{model}b_igrpo")
    ours = composed(experiment)
    assert ours.igrpo.feedback == method and RolloutBudget(ours).completions == 1024
    assert ours.feedback.num_trained == {"self_verification": 8, "critique": 5}[method]
    for section in ("data", "cluster", "env", "policy"):
        left, right = at(ours, section), at(igrpo, section)
        if section == "policy":
            for values in (left, right):
                del values["train_global_batch_size"]
        assert left == right
    assert ours.grpo.normalize_rewards is (method == "self_verification")
    assert ours.igrpo.shaping_gamma == (0.1 if method == "critique" else None)


def test_the_decisions_are_numbered_without_gaps():
    assert list(decisions()) == list(range(1, len(decisions()) + 1))


def test_the_system_prompt_is_the_papers():
    prompt = composed(SEVEN).igrpo.prompt.system
    assert prompt.startswith("You are a helpful AI Assistant that provides well-reasoned and")
    assert "then give the answer: <think>...</think><answer>...</answer>. If the" in prompt
    assert prompt.endswith("If the feedback is wrong or incomplete, correct it and proceed.")
    assert len(prompt) == 520 and prompt.count("draft") == 2
    assert composed("table1_nemotron_h_8b_grpo").igrpo.prompt.system == prompt


def same_training(left: str, right: str) -> bool:
    values = [composed(name).to_dict() for name in (left, right)]
    sections = ("igrpo", "grpo", "loss_fn", "policy", "data", "cluster")
    return all(values[0][section] == values[1][section] for section in sections)


def test_rows_of_table_s4_that_are_table_1s():
    assert same_training("tableS4_beta_0", SEVEN)
    assert same_training("tableS4_completions_8", SEVEN)
    assert not same_training("tableS4_beta_1e-4", SEVEN)


@pytest.mark.parametrize(("experiment", "problems", "steps", "warmup"), CASES["schedules"])
def test_the_schedule_follows_from_data_batch_and_epochs(experiment, problems, steps, warmup):
    written = config_of(f"experiment={experiment}")
    assert at(written, "policy.megatron_cfg.scheduler.lr_decay_iters") is None
    config = composed(experiment)
    assert expected_problems(config) == problems
    assert rollout_steps(config, problems) == steps
    scheduler = at(config, "policy.megatron_cfg.scheduler")
    assert (scheduler["lr_decay_iters"], scheduler["lr_warmup_iters"]) == (steps, warmup)
    ramp, decay, _ = config.policy.scheduler or []
    assert ramp["kwargs"]["total_iters"] + decay["kwargs"]["T_max"] == steps
    twice = composed(experiment, "grpo.max_num_epochs=2")
    assert at(twice, "policy.megatron_cfg.scheduler.lr_decay_iters") == 2 * steps


def test_a_given_megatron_schedule_is_kept():
    given = [f"policy.megatron_cfg.scheduler.lr_warmup_{key}" for key in ("iters=1", "init=1.0e-9")]
    scheduler = at(composed(SEVEN, *given), "policy.megatron_cfg.scheduler")
    assert (scheduler["lr_decay_iters"], scheduler["lr_warmup_iters"]) == (58, 1)
    assert scheduler["lr_warmup_init"] == 1e-9


@pytest.mark.parametrize(("overrides", "problems"), CASES["expected_problems"])
def test_expected_problems(overrides, problems):
    assert expected_problems(config_of("policy.model_name=x", *overrides)) == problems


def published() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((CONFIGS / "paper_results.yaml").read_text(encoding="utf-8"))


def test_published_averages_are_recomputed():
    for name, row in published().items():
        columns = [v for k, v in row.items() if isinstance(v, float) and "average" not in k]
        if len(columns) != 6:
            assert row["recomputed_average"] is None
            continue
        mean = sum(columns) / 6
        assert row["recomputed_average"] == pytest.approx(mean, abs=0.005001), name
        differs = abs(row["published_average"] - mean) > 0.02
        assert differs == (name == "table1_deepseek_r1_distill_qwen_7b_base")
    base = published_results("table1_deepseek_r1_distill_qwen_7b_base")
    assert (base.average, base.recomputed) == (0.6193, pytest.approx(0.6782))


UNPUBLISHED = {
    "figure2_openreasoning_nemotron_7b_grpo",
    "literal_deepseek_r1_distill_qwen_7b_igrpo",
    *(name for name in BASELINES if "openmath" in name or "14b" in name),
}
"""Controls of this project's own, and rows that Table 1 leaves out."""


@pytest.mark.parametrize("experiment", sorted(set(EXPERIMENTS) - UNPUBLISHED))
def test_the_file_of_an_experiment_says_what_was_published(experiment):
    lines = (CONFIGS / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
    row = published()[experiment]
    figures = [v for k, v in row.items() if isinstance(v, float) and k != "recomputed_average"]
    for value in figures:
        assert f"{value:.2f}" in comment
    for value in row.get("cost", {}).values():
        assert f"{value:g}" in comment
    assert figures or "cost" in row


def test_published_rows_are_experiments_or_untrained_models():
    for name in published():
        assert name in EXPERIMENTS or name.endswith("_base")


def test_benchmarks_of_an_evaluation_and_of_the_paper_share_their_names():
    row = published_results(SEVEN)
    assert set(row.benchmarks) == set(composed(SEVEN).igrpo.evaluation.benchmarks)
    gain = published()["figure2_openreasoning_nemotron_7b_igrpo"]["gain"]
    names = composed("figure2_openreasoning_nemotron_7b_igrpo").igrpo.evaluation.benchmarks
    assert set(gain) - {"average"} <= set(names)


@pytest.mark.parametrize(("option", "samples", "profile"), CASES["evaluations"])
def test_evaluations(option, samples, profile):
    evaluation = config_of("policy.model_name=x", f"eval={option}").igrpo.evaluation
    assert samples.items() <= evaluation.benchmarks.items()
    assert evaluation.profile == profile
    sizes = {"paper": 6, "paper_boxed": 6, "all_64": 6, "general": 2, "pass_at_256": 2}
    assert len(evaluation.benchmarks) == sizes.get(option, 8)


@pytest.mark.parametrize("model", MODELS)
def test_a_models_shape_and_the_parallel_sizes_fit(model):
    config = config_of("engine=nemo_rl", "cluster=a100_5x8", f"model={model}")
    shape = config.igrpo.architecture
    assert shape is not None
    assert (
        shape.hidden_size,
        shape.num_hidden_layers,
        shape.num_attention_heads,
        shape.num_key_value_heads,
        shape.intermediate_size,
        shape.vocab_size,
        shape.max_position_embeddings,
    ) == tuple(CASES["shapes"][model])
    assert config.policy.max_total_sequence_length <= shape.max_position_embeddings
    tensor = at(config, "policy.megatron_cfg.tensor_model_parallel_size")
    for size in (shape.num_attention_heads, shape.num_key_value_heads, shape.vocab_size):
        assert size % tensor == 0
    assert config.policy.make_sequence_length_divisible_by is not None
    assert config.policy.make_sequence_length_divisible_by % tensor == 0
    pattern = shape.hybrid_override_pattern
    if pattern is not None:
        assert len(pattern) == shape.num_hidden_layers
        assert [pattern.count(letter) for letter in "M-*"] == [24, 24, 4]


def test_the_hybrid_model_samples_all_at_once():
    config = composed("table1_nemotron_h_8b_igrpo")
    assert not config.policy.sequence_packing.enabled
    sequences = RolloutBudget(composed("table1_nemotron_h_8b_grpo")).completions / 8
    assert at(config, "policy.generation.vllm_kwargs.max_num_seqs") >= sequences


def test_a_base_models_template_shows_the_whole_conversation(tokenizer):
    from igrpo_nemo.run.core import prompt_builder
    from igrpo_nemo.types import Problem

    config = composed("table1_nemotron_h_8b_igrpo")
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = config.policy.tokenizer.chat_template
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "{{ q }}"}]
    rendered = plain.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "S\n\nUser: {{ q }}\n\nAssistant:"
    again = plain.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    assert again == "S\n\nUser: {{ q }}\n\n"
    builder = prompt_builder(config, plain)
    refined = builder.refinement(Problem("p", "1+2=", "3"), "it is 3")
    system, _, rest = refined.text.partition("\n\nUser: ")
    assert system == config.igrpo.prompt.system
    assert rest == "1+2=\n\nA prior draft:\n<draft>\nit is 3\n</draft>\n\nAssistant:"
    assert not refined.thinking_open

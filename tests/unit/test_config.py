"""Composition, schema, derivation and cross-field checks of the configuration."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from cases import cases
from composed import CONFIGS, GROUPS, config_of, made

from igrpo_nemo.config import RolloutBudget, load_config, read_config, schema
from igrpo_nemo.config.schema import all_keys, unread
from igrpo_nemo.errors import UserError

DEMO = [
    *("experiment=demo", "grpo.num_prompts_per_step=32", "policy.generation.max_new_tokens=48"),
    *("igrpo.model.hidden_size=64", "igrpo.model.num_heads=4", "igrpo.model.num_kv_heads=4"),
    "data.train.num_problems=4096",
]
"""The demo with the sizes that the numbers below are made from."""
HF = ["policy.model_name=some/model"]
ANY_DATA = ["data.train.data_path=a.jsonl", "data.validation.data_path=b.jsonl"]
CASES = cases(__file__)


def error_of(*overrides: str, base: list[str] = DEMO, load: Callable[..., Any] = made) -> str:
    with pytest.raises(UserError) as caught:
        load(*base, *overrides)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


def hydra_error_of(*overrides: str, base: list[str] = DEMO) -> str:
    return error_of(*overrides, base=base, load=lambda *words: load_config(words))


def combinations() -> Iterator[list[str]]:
    """Few command lines that name every file of every group."""
    for option in GROUPS["experiment"]:
        yield [f"experiment={option}", *([*HF, *ANY_DATA] if option == "laptop" else [])]
    choices = [group for group in GROUPS if group not in ("experiment", "engine", "cluster")]
    for number in range(max(len(GROUPS[group]) for group in choices)):
        words = [*HF, "engine=nemo_rl", "cluster=a100_2x8"]
        words += [f"{group}={GROUPS[group][number % len(GROUPS[group])]}" for group in choices]
        yield [*words, *ANY_DATA]
    for group in ("engine", "cluster"):
        for option in GROUPS[group]:
            needs = ["engine=nemo_rl"] if group == "cluster" and option != "laptop" else []
            yield [*HF, *needs, f"{group}={option}"]


@pytest.mark.parametrize("words", combinations())
def test_every_config_file_composes(words):
    assert config_of(*words).grpo.num_generations_per_prompt >= 2


def test_every_group_is_in_the_defaults_list_and_every_key_described():
    defaults = yaml.safe_load((CONFIGS / "config.yaml").read_text())["defaults"]
    assert {next(iter(d)) for d in defaults if d != "_self_"} == set(GROUPS)
    keys = list(all_keys())
    assert len(keys) > 150 and [key.path for key in keys if not key.description] == []


def test_defaults_and_objectives_are_the_papers():
    """What `paper_values.yaml` asks of the experiments, of a config that names a model alone."""
    config = config_of(*HF)
    budget = RolloutBudget(config)
    assert (budget.completions, budget.trained_rows, budget.updates) == (1024, 512, 1)
    assert (config.igrpo.num_drafts, config.igrpo.num_refinements, config.igrpo.budget) == (4, 4, 8)
    assert config.igrpo.feedback == "best_draft" and config.igrpo.train_stages == ["refine"]
    assert config.policy.max_total_sequence_length == 9728 == 1024 + 4096 + 512 + 4096
    for objective in ("dapo", "gspo"):
        config = config_of(*HF, f"objective={objective}")
        assert config.igrpo.updates_per_rollout == 4
        assert config.policy.train_global_batch_size == 512 // 4
    dapo = config_of(*HF, "objective=dapo").grpo
    assert dapo.reward_scaling.source_max == 2.0
    assert dapo.reward_shaping.overlong_buffer_length == 819
    assert dapo.reward_shaping.max_response_length == 4096
    accuracy_only = config_of(*HF, "objective=dapo", "reward=accuracy")
    assert accuracy_only.grpo.reward_scaling.source_max == 1.0
    config = config_of(*HF, "objective=dr_grpo", "policy.generation.max_new_tokens=100")
    assert config.igrpo.constant_length_divisor == 100 and not config.grpo.normalize_rewards


@pytest.mark.parametrize(("overrides", "rows", "budget"), CASES["trained_rows_are_derived"])
def test_trained_rows_are_derived(overrides, rows, budget):
    config = config_of(*DEMO, *overrides)
    assert config.grpo.num_generations_per_prompt == rows
    assert config.policy.train_global_batch_size == 32 * rows
    assert (config.igrpo.updates_per_rollout, config.igrpo.budget) == (1, budget)


def test_batch_and_updates_follow_each_other():
    by_batch = config_of(*DEMO, "policy.train_global_batch_size=32")
    assert by_batch.igrpo.updates_per_rollout == 4
    by_updates = config_of(*DEMO, "igrpo.updates_per_rollout=4")
    assert by_updates.policy.train_global_batch_size == 32
    assert by_batch == by_updates


@pytest.mark.parametrize(("overrides", "expected"), CASES["refused"])
def test_what_cannot_be_is_refused_in_one_line(overrides, expected):
    assert expected in error_of(*overrides)


@pytest.mark.parametrize(("overrides", "expected"), CASES["hydra"])
def test_wrong_override_is_one_line(overrides, expected):
    assert expected in hydra_error_of(*overrides)


def test_what_is_missing_is_named_with_what_to_give():
    message = hydra_error_of("experiment=table1_openmath_14b_igrpo", base=[])
    assert "does not exist: use table1_openmath_nemotron_14b_igrpo, " in message
    assert f"({len(GROUPS['experiment'])} in configs/experiment)" in message
    assert hydra_error_of(base=[]) == "policy.model_name is not set: give policy.model_name=..."
    assert "data.train.data_path is not set" in hydra_error_of("data=jsonl", base=HF)


def test_a_key_that_is_gone_says_what_to_do(monkeypatch):
    assert config_of(*DEMO, "igrpo.warmup.slip=0.03") == config_of(*DEMO)
    gone = {"igrpo.old": {"unused": ["off", False], "say": "leave it out"}}
    monkeypatch.setattr(schema, "GONE", gone)
    assert error_of("igrpo.old=on") == "igrpo.old is gone: leave it out"
    assert error_of("igrpo.old.part=1") == "igrpo.old is gone: leave it out"
    assert config_of(*DEMO, "igrpo.old=off") == config_of(*DEMO)


def test_a_plus_before_a_built_in_group_is_accepted():
    assert load_config(["+experiment=demo"]) == config_of("experiment=demo")


def test_nemo_only_keys_are_accepted_and_reported():
    keys = ["policy.megatron_cfg.tensor_model_parallel_size=4", "grpo.async_grpo.enabled=false"]
    keys += ["policy.generation.vllm_cfg.gpu_memory_utilization=0.85"]
    keys += ["policy.make_sequence_length_divisible_by=8"]
    keys += ["loss_fn.use_importance_sampling_correction=false"]
    config = config_of(*DEMO, *keys)
    assert config.policy.megatron_cfg == {"tensor_model_parallel_size": 4}
    assert unread(config) == [
        *("grpo.async_grpo", "policy.generation.vllm_cfg"),
        *("policy.make_sequence_length_divisible_by", "policy.megatron_cfg"),
    ]
    vllm = config.replaced("policy.generation", backend="vllm")
    assert set(unread(config)) - set(unread(vllm)) == {"policy.generation.vllm_cfg"}
    # Below an open mapping of NeMo-RL's keys are free, and what nobody set is not in the dump.
    config = config_of(*DEMO, "policy.generation.vllm_kwargs.compilation_config={level: 3}")
    assert config.policy.generation.vllm_kwargs == {"compilation_config": {"level": 3}}
    dump = config_of(*DEMO).to_dict()["policy"]
    assert "megatron_cfg" not in dump and dump["generation"]["top_k"] is None


@pytest.mark.parametrize("overrides", [DEMO, [*HF, "objective=dapo", "feedback=none"]])
def test_a_written_config_reads_back_equal(overrides, tmp_path):
    """And its texts are not interpolated."""
    text = "braces {x} and ${y}"
    config = config_of(*overrides).replaced("igrpo.prompt", system=text)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert read_config(path).to_dict() == config.to_dict()
    changed = read_config(path, ["grpo.seed=7", "igrpo.prompt.system=a: b"])
    assert changed == config.replaced("grpo", seed=7).replaced("igrpo.prompt", system="a: b")
    with pytest.raises(ValueError, match="frozen"):
        config.grpo.seed = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_a_written_config_takes_no_groups_and_no_typos(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(config_of(*DEMO).to_yaml())
    for words, told in (
        (["prompt=paper"], "composed already"),
        (["grpo.sed=1"], "did you mean grpo.seed"),
        (["grpo.seed=1,2"], "a list is"),
    ):
        with pytest.raises(UserError, match=told):
            read_config(path, words)
    with pytest.raises(UserError, match="cannot read"):
        read_config(tmp_path / "none.yaml")
    path.write_text("{")
    with pytest.raises(UserError, match="is no YAML file"):
        read_config(path)


def test_a_folder_of_further_groups(tmp_path):
    folder = tmp_path / "a 'b'" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - demo\n  - _self_\ngrpo:\n  max_num_steps: 7\n"
    )
    config = load_config(["experiment=mine"], folder.parent)
    assert config.grpo.max_num_steps == 7 and config.igrpo.model is not None
    (folder / "broken.yaml").write_text("grpo: {seed: 1\ndata: 2\n")
    for name, told in (("min", "mine, "), ("broken", r"is no YAML: .*broken\.yaml")):
        with pytest.raises(UserError, match=told) as caught:
            load_config([f"experiment={name}"], folder.parent)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="there is no config folder"):
        load_config(DEMO, tmp_path / "nowhere")


def test_demo_and_its_baseline_differ_in_feedback_alone():
    ours, baseline = config_of("experiment=demo"), config_of("experiment=demo_grpo")
    assert RolloutBudget(ours).completions == RolloutBudget(baseline).completions
    assert (ours.igrpo.feedback, baseline.igrpo.feedback) == ("best_draft", "none")
    for section in ("loss_fn", "data", "env"):
        assert getattr(ours, section) == getattr(baseline, section)


def test_configs_are_found_inside_an_installed_package(tmp_path):
    installed = tmp_path / "site" / "igrpo_nemo"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CONFIGS.parent / "igrpo_nemo", installed, ignore=ignored)
    shutil.copytree(CONFIGS, installed / "configs")
    code = (
        "from igrpo_nemo.config import load_config;"
        "from igrpo_nemo.config.compose import builtin_config_dir;"
        "load_config(['experiment=demo']); print(builtin_config_dir())"
    )
    (tmp_path / "empty").mkdir()
    environ = {**os.environ, "PYTHONPATH": str(installed.parent)}
    words = [sys.executable, "-c", code]
    told = subprocess.check_output(words, cwd=tmp_path / "empty", env=environ, text=True)
    assert told.strip() == str(installed / "configs")

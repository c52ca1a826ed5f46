"""Composition, schema, derivation and cross-field checks of the configuration."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from composed import CONFIGS, GROUPS, config_of, made

from igrpo_nemo.config import (
    RolloutBudget,
    load_config,
    read_config,
    schema,
)
from igrpo_nemo.config.compose import BUILT_IN_GROUPS
from igrpo_nemo.config.schema import all_keys, unread
from igrpo_nemo.errors import UserError

DEMO = [
    "experiment=demo",
    "grpo.num_prompts_per_step=32",
    "policy.generation.max_new_tokens=48",
    "igrpo.model.hidden_size=64",
    "igrpo.model.num_heads=4",
    "igrpo.model.num_kv_heads=4",
    "data.train.num_problems=4096",
]
"""The demo with the sizes that the numbers below are made from."""
HF = ["policy.model_name=some/model"]
ANY_DATA = ["data.train.data_path=a.jsonl", "data.validation.data_path=b.jsonl"]


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
def test_every_config_file_composes(words: list[str]) -> None:
    assert config_of(*words).grpo.num_generations_per_prompt >= 2


def test_every_group_is_in_the_defaults_list() -> None:
    assert sorted(GROUPS) == sorted(BUILT_IN_GROUPS)
    defaults = yaml.safe_load((CONFIGS / "config.yaml").read_text())["defaults"]
    assert {next(iter(d)) for d in defaults if d != "_self_"} == set(BUILT_IN_GROUPS)


def test_defaults_are_the_papers() -> None:
    config = config_of(*HF)
    budget = RolloutBudget.of(config)
    assert (budget.completions, budget.trained_rows, budget.updates) == (1024, 512, 1)
    assert (config.igrpo.num_drafts, config.igrpo.num_refinements, config.igrpo.budget) == (4, 4, 8)
    assert config.igrpo.feedback == "best_draft" and config.igrpo.train_stages == ["refine"]
    generation = config.policy.generation
    assert (generation.temperature, generation.top_p, generation.max_new_tokens) == (0.7, 1.0, 4096)
    kwargs = config.policy.optimizer.kwargs
    assert (kwargs.lr, kwargs.weight_decay, config.policy.max_grad_norm) == (1e-6, 0.0, 1.0)
    loss = config.loss_fn
    assert (loss.ratio_clip_min, loss.ratio_clip_max, loss.token_level_loss) == (0.2, 0.2, False)
    assert loss.reference_policy_kl_penalty == 0.0
    assert config.grpo.normalize_rewards and not config.grpo.use_leave_one_out_baseline
    assert (config.igrpo.reward.accuracy, config.igrpo.reward.format) == (1.0, 1.0)
    assert config.policy.max_total_sequence_length == 9728 == 1024 + 4096 + 512 + 4096
    assert config.igrpo.prompt.system.startswith("You are a helpful AI Assistant that provides")
    assert config.igrpo.prompt.system.endswith("is wrong or incomplete, correct it and proceed.")


@pytest.mark.parametrize("objective", ["dapo", "gspo"])
def test_table_2_presets_use_four_updates(objective: str) -> None:
    config = config_of(*HF, f"objective={objective}")
    assert config.igrpo.updates_per_rollout == 4
    assert config.policy.train_global_batch_size == 512 // 4


def test_dapo_preset_fits_reward_and_length() -> None:
    config = config_of(*HF, "objective=dapo")
    assert config.grpo.reward_scaling.source_max == 2.0
    assert config.grpo.reward_shaping.overlong_buffer_length == 819
    assert config.grpo.reward_shaping.max_response_length == 4096
    assert config.loss_fn.ratio_clip_max == 0.28 and config.loss_fn.token_level_loss
    accuracy_only = config_of(*HF, "objective=dapo", "reward=accuracy")
    assert accuracy_only.grpo.reward_scaling.source_max == 1.0


def test_dr_grpo_divides_by_the_completion_limit() -> None:
    config = config_of(*HF, "objective=dr_grpo", "policy.generation.max_new_tokens=100")
    assert config.igrpo.constant_length_divisor == 100
    assert not config.grpo.normalize_rewards


@pytest.mark.parametrize(
    ("overrides", "rows"),
    [
        ([], 4),
        (["igrpo.num_drafts=2", "igrpo.num_refinements=6"], 6),
        (["igrpo.train_stages=[draft,refine]"], 8),
        (["feedback=none"], 8),
        (["feedback=none", "igrpo.budget=12"], 12),
        (["igrpo.num_drafts=3", "igrpo.budget=null"], 4),
        (["grpo.num_generations_per_prompt=4"], 4),
    ],
)
def test_trained_rows_are_derived(overrides: list[str], rows: int) -> None:
    config = config_of(*DEMO, *overrides)
    assert config.grpo.num_generations_per_prompt == rows
    assert config.policy.train_global_batch_size == 32 * rows
    assert config.igrpo.updates_per_rollout == 1
    if "igrpo.budget=null" in overrides:
        assert config.igrpo.budget == 7


def test_batch_and_updates_follow_each_other() -> None:
    by_batch = config_of(*DEMO, "policy.train_global_batch_size=32")
    assert by_batch.igrpo.updates_per_rollout == 4
    by_updates = config_of(*DEMO, "igrpo.updates_per_rollout=4")
    assert by_updates.policy.train_global_batch_size == 32
    assert by_batch == by_updates


CONTRADICTIONS = yaml.safe_load(
    Path(__file__).with_name("contradictions.yaml").read_text(encoding="utf-8")
)


@pytest.mark.parametrize(("overrides", "expected"), CONTRADICTIONS)
def test_contradiction_is_one_line(overrides: list[str], expected: str) -> None:
    assert expected in error_of(*overrides)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("grpo.max_num_stps=3", "unknown key grpo.max_num_stps: did you mean grpo.max_num_steps?"),
        ("igrpo.num_draft=3", "did you mean igrpo.num_drafts?"),
        ("qqqqq.wwwww=1", "unknown key qqqqq: `igrpo keys` lists the known ones"),
        ("igrpo.max_new_tokens=3", "did you mean policy.generation.max_new_tokens?"),
        ("polcy.precision=float32", "unknown key polcy: did you mean policy?"),
        ("feedbck=none", "unknown key feedbck: did you mean feedback?"),
        ("zzz=1", "unknown key zzz: `igrpo keys` lists the known ones"),
        ("policy.optimizer.kwargs.learning_rate=1", "unknown key policy.optimizer.kwargs.learning"),
        (
            "policy.megatron_cfg.tensor_model_paralel_size=4",
            "did you mean policy.megatron_cfg.tensor_model_parallel_size?",
        ),
        ("grpo.async_grpo.enable=true", "did you mean grpo.async_grpo.enabled?"),
        (
            "policy.generation.vllm_cfg.qqqq=1",
            "unknown key policy.generation.vllm_cfg.qqqq: NeMo-RL 0.7.0 does not know it",
        ),
    ],
)
def test_unknown_key_names_the_nearest(override: str, expected: str) -> None:
    assert expected in error_of(override)


def test_a_key_that_is_gone_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "igrpo.short_circuit is gone: " in error_of("igrpo.short_circuit=first")
    assert "igrpo.warmup.slip is gone: " in error_of("igrpo.warmup.slip=0.1")
    assert config_of(*DEMO, "igrpo.warmup.slip=0.03") == config_of(*DEMO)
    gone = {"igrpo.old": {"unused": ["off", False], "say": "leave it out"}}
    monkeypatch.setattr(schema, "GONE", gone)
    assert error_of("igrpo.old=on") == "igrpo.old is gone: leave it out"
    assert error_of("igrpo.old.part=1") == "igrpo.old is gone: leave it out"
    assert config_of(*DEMO, "igrpo.old=off") == config_of(*DEMO)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["grpo.max_num_steps=many"], "grpo.max_num_steps='many' should be a valid integer"),
        (["grpo.max_num_steps=true"], "grpo.max_num_steps=True should be a valid integer"),
        (["grpo.max_num_steps=1.5"], "grpo.max_num_steps=1.5 should be a valid integer"),
        (["grpo.val_at_end=1"], "grpo.val_at_end=1 should be a valid boolean"),
        (["logger.log_dir="], "logger.log_dir='' should have at least 1 character"),
        (["igrpo.prompt.system=7"], "igrpo.prompt.system=7 should be a valid string"),
        (["policy.optimizer.kwargs.lr=inf"], "should be a finite number"),
        (["igrpo.schedule=fast"], "igrpo.schedule='fast' should be"),
        (["grpo.val_period=a", "grpo.val_at_end=b"], "; "),
    ],
)
def test_wrong_value_is_one_line(overrides: list[str], expected: str) -> None:
    assert expected in error_of(*overrides)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["experiment=null"], "experiment=null does not exist"),
        (["grpo.max_num_steps"], "cannot read the override 'grpo.max_num_steps': write key=value"),
        (["=3"], "cannot read the override '=3': write key=value"),
        (["grpo.max_num_steps=[1"], "cannot read the override 'grpo.max_num_steps=[1'"),
        (["grpo.max_num_steps=1,2"], "a list is [a,b], a text 'a,b'"),
        (["objective=ppo"], "objective=ppo does not exist: use dapo, dr_grpo, grpo, gspo"),
        (["objective=null"], "objective=null does not exist"),
        (["hydra.run.dir=x"], "hydra.run.dir is Hydra's own"),
        (["logger.log_dir=${nowhere}"], "Interpolation key 'nowhere' not found"),
        (["~grpo.val_period"], "grpo.val_period is missing"),
    ],
)
def test_wrong_override_is_one_line(overrides: list[str], expected: str) -> None:
    assert expected in hydra_error_of(*overrides)


def test_missing_experiment_names_the_nearest_ones() -> None:
    message = hydra_error_of("experiment=table1_openmath_14b_igrpo", base=[])
    assert "does not exist: use table1_openmath_nemotron_14b_igrpo, " in message
    assert f"({len(GROUPS['experiment'])} in configs/experiment)" in message


def test_missing_model_says_what_to_give() -> None:
    assert hydra_error_of(base=[]) == "policy.model_name is not set: give policy.model_name=..."
    assert "data.train.data_path is not set" in hydra_error_of("data=jsonl", base=HF)


def test_a_plus_before_a_built_in_group_is_accepted() -> None:
    assert load_config(["+experiment=demo"]) == config_of("experiment=demo")


def test_nemo_only_keys_are_accepted_and_reported() -> None:
    config = config_of(
        *[
            *DEMO,
            "policy.megatron_cfg.tensor_model_parallel_size=4",
            "policy.generation.vllm_cfg.gpu_memory_utilization=0.85",
            "policy.make_sequence_length_divisible_by=8",
            "grpo.async_grpo.enabled=false",
            "loss_fn.use_importance_sampling_correction=false",
        ]
    )
    assert config.policy.megatron_cfg == {"tensor_model_parallel_size": 4}
    assert unread(config) == [
        "grpo.async_grpo",
        "policy.generation.vllm_cfg",
        "policy.make_sequence_length_divisible_by",
        "policy.megatron_cfg",
    ]
    vllm = config.replaced("policy.generation", backend="vllm")
    assert set(unread(config)) - set(unread(vllm)) == {"policy.generation.vllm_cfg"}


def test_keys_below_an_open_mapping_of_nemo_rl_are_free() -> None:
    config = config_of(*DEMO, "policy.generation.vllm_kwargs.compilation_config={level: 3}")
    assert config.policy.generation.vllm_kwargs == {"compilation_config": {"level": 3}}


def test_keys_that_nobody_set_are_absent_from_the_dump() -> None:
    dump = config_of(*DEMO).to_dict()
    assert "megatron_cfg" not in dump["policy"]
    assert dump["policy"]["generation"]["top_k"] is None


@pytest.mark.parametrize("overrides", [DEMO, [*HF, "objective=dapo", "feedback=none"]])
def test_a_written_config_reads_back_equal(overrides: list[str], tmp_path: Path) -> None:
    config = load_config(overrides)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    again = read_config(path)
    assert again.to_dict() == config.to_dict()
    changed = read_config(path, ["grpo.seed=7", "igrpo.prompt.system=a: b"])
    expected = again.replaced("grpo", seed=7).replaced("igrpo.prompt", system="a: b")
    assert changed == expected


def test_a_written_text_is_not_interpolated(tmp_path: Path) -> None:
    text = "braces {x} and ${y}"
    config = config_of(*DEMO).replaced("igrpo.prompt", system=text)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert read_config(tmp_path / "config.yaml").igrpo.prompt.system == text


def test_a_written_config_takes_no_groups_and_no_typos(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(config_of(*DEMO).to_yaml())
    with pytest.raises(UserError, match="composed already"):
        read_config(path, ["prompt=paper"])
    with pytest.raises(UserError, match="did you mean grpo.seed"):
        read_config(path, ["grpo.sed=1"])
    with pytest.raises(UserError, match="a list is"):
        read_config(path, ["grpo.seed=1,2"])
    with pytest.raises(UserError, match="cannot read"):
        read_config(tmp_path / "none.yaml")
    path.write_text("{")
    with pytest.raises(UserError, match="is no YAML file"):
        read_config(path)


def test_a_folder_of_further_groups(tmp_path: Path) -> None:
    folder = tmp_path / "a 'b'" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - demo\n  - _self_\ngrpo:\n  max_num_steps: 7\n"
    )
    config = load_config(["experiment=mine"], folder.parent)
    assert config.grpo.max_num_steps == 7 and config.igrpo.model is not None
    with pytest.raises(UserError, match="use mine, "):
        load_config(["experiment=min"], folder.parent)
    with pytest.raises(UserError, match="there is no config folder"):
        load_config(DEMO, tmp_path / "nowhere")


def test_a_group_file_that_is_no_yaml_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "broken.yaml").write_text("grpo: {seed: 1\ndata: 2\n")
    with pytest.raises(UserError, match=r"is no YAML: .*broken\.yaml") as caught:
        load_config(["experiment=broken"], tmp_path)
    assert "\n" not in str(caught.value)


def test_demo_and_its_baseline_differ_in_feedback_alone() -> None:
    ours, baseline = config_of("experiment=demo"), config_of("experiment=demo_grpo")
    assert RolloutBudget.of(ours).completions == RolloutBudget.of(baseline).completions
    assert (ours.igrpo.feedback, baseline.igrpo.feedback) == ("best_draft", "none")
    for section in ("loss_fn", "data", "env"):
        assert getattr(ours, section) == getattr(baseline, section)


def test_configs_are_frozen() -> None:
    config = config_of(*DEMO)
    with pytest.raises(ValueError, match="frozen"):
        config.grpo.seed = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_every_key_has_a_description() -> None:
    keys = list(all_keys())
    assert len(keys) > 150
    assert [key.path for key in keys if not key.description] == []


def test_configs_are_found_inside_an_installed_package(tmp_path: Path) -> None:
    configs = CONFIGS
    package = configs.parent / "igrpo_nemo"
    installed = tmp_path / "site" / "igrpo_nemo"
    shutil.copytree(package, installed, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(configs, installed / "configs")
    code = (
        "from igrpo_nemo.config import load_config;"
        "from igrpo_nemo.config.compose import builtin_config_dir;"
        "load_config(['experiment=demo']); print(builtin_config_dir())"
    )
    work = tmp_path / "empty"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(installed.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(installed / "configs")

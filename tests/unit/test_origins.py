"""`igrpo train --dry-run`: the origin of every value is the file, override or code that set it."""

from __future__ import annotations

import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from igrpo_nemo.cli import train
from igrpo_nemo.config import load_config, with_problems
from igrpo_nemo.config.compose import builtin_config_dir, composed_values, config_groups, quoted
from igrpo_nemo.config.origins import COMMAND_LINE, DERIVED, annotated_yaml, origins_of

CONFIGS = builtin_config_dir()
GROUPS = config_groups([CONFIGS])
TENSOR = "policy.megatron_cfg.tensor_model_parallel_size"
HYBRID = ["experiment=table1_nemotron_h_8b_igrpo"]
HOSTILE = "a: 'b' # c\n# d: [e, \"f\"]\n"
DAPO = ["experiment=table2_dapo_igrpo"]
ONE_OF_EACH_KIND = (
    "demo_grpo",
    "table1_nemotron_h_8b_igrpo",
    "table2_dapo_igrpo",
    "table3_judge",
    "tableS1_openmath_nemotron_14b_igrpo",
    "tableS4_beta_1e-2",
)
"""Every other experiment is of the same files with other numbers."""


def origins(overrides: list[str], config_dir: Path | None = None) -> dict[str, Any]:
    """The origins by dotted path, as `--dry-run` has them."""
    config = load_config(overrides, config_dir)
    found = origins_of(with_problems(config, 7_493), overrides, config_dir)
    return {".".join(path): origin for path, origin in found.items()}


@cache
def origins_once(*overrides: str) -> dict[str, Any]:
    return origins(list(overrides))


@pytest.mark.parametrize(
    ("overrides", "key", "where"),
    [
        (HYBRID, "grpo.num_prompts_per_step", "configs/config.yaml"),
        (HYBRID, "logger.log_dir", "configs/experiment/table1_nemotron_h_8b_igrpo.yaml"),
        (HYBRID, TENSOR, "configs/model/nemotron_h_8b.yaml"),
        (DAPO, TENSOR, "configs/model/base/qwen2_7b.yaml"),
        (DAPO, "policy.model_name", "configs/model/deepseek_r1_distill_qwen_7b.yaml"),
        (DAPO, "policy.megatron_cfg.context_parallel_size", "configs/engine/nemo_rl.yaml"),
        (DAPO, "loss_fn.ratio_clip_min", "configs/objective/grpo.yaml"),
        (DAPO, "loss_fn.ratio_clip_max", "configs/objective/dapo.yaml"),
        (DAPO, "igrpo.reward.format", "configs/reward/accuracy_format.yaml"),
        (DAPO, "igrpo.prompt.system", "configs/prompt/paper.yaml"),
        (DAPO, "cluster.num_nodes", "configs/cluster/a100_2x8.yaml"),
        ([*DAPO, "cluster=h100_2x8"], "cluster.num_nodes", "configs/cluster/h100_2x8.yaml"),
        ([*DAPO, "cluster.num_nodes=3"], "cluster.num_nodes", COMMAND_LINE),
        ([*DAPO, "igrpo.site.env={A: b}"], "igrpo.site.env.A", COMMAND_LINE),
        ([*DAPO, "objective=gspo"], "loss_fn.ratio_clip_max", "configs/objective/gspo.yaml"),
        (["experiment=demo_grpo"], "policy.optimizer.kwargs.lr", "configs/experiment/demo.yaml"),
        (["experiment=demo_grpo"], "logger.log_dir", "configs/experiment/demo_grpo.yaml"),
        (["experiment=demo_grpo"], "igrpo.feedback", "configs/feedback/none.yaml"),
        (DAPO, "igrpo.draft_prefetch", "default: igrpo_nemo/config/igrpo_keys.py"),
        (DAPO, "igrpo.site.max_restarts", "default: igrpo_nemo/config/igrpo_keys.py"),
        (DAPO, "data.train.drop_overlap", "default: igrpo_nemo/config/nemo_keys.py"),
    ],
)  # fmt: skip
def test_where_a_value_comes_from(overrides: list[str], key: str, where: str) -> None:
    assert origins_once(*overrides)[key] == where


def test_derived_values_say_so() -> None:
    found = origins(DAPO)
    derived = {key for key, origin in found.items() if origin == DERIVED}
    assert derived == {
        "grpo.num_generations_per_prompt",
        "policy.train_global_batch_size",
        "policy.scheduler",
        "policy.megatron_cfg.scheduler.lr_decay_iters",
        "policy.megatron_cfg.scheduler.lr_warmup_iters",
        "policy.megatron_cfg.scheduler.lr_warmup_init",
    }
    given = origins([*DAPO, "policy.train_global_batch_size=128"])
    assert given["policy.train_global_batch_size"] == COMMAND_LINE
    assert found["igrpo.updates_per_rollout"] == "configs/objective/dapo.yaml"
    assert origins(HYBRID)["igrpo.updates_per_rollout"] == DERIVED


def test_an_expression_is_shown_where_it_stands() -> None:
    origin = origins(DAPO)["policy.generation.vllm_cfg.max_model_len"]
    expected = "configs/engine/nemo_rl.yaml: ${policy.max_total_sequence_length}"
    assert str(origin) == expected
    mine = origins([*DAPO, "grpo.val_batch_size=${grpo.max_val_samples}"])
    assert str(mine["grpo.val_batch_size"]) == "command line: ${grpo.max_val_samples}"


def test_a_mapping_in_an_expression_gives_its_origin_to_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - demo\n  - _self_\n"
    text += "data:\n  validation: ${data.train}\n"
    file = tmp_path / "experiment" / "mine.yaml"
    file.write_text(text)
    found = origins(["experiment=mine"], tmp_path)
    assert str(found["data.validation.dataset_name"]) == f"{file}: ${{data.train}}"
    assert found["data.train.dataset_name"] == "configs/data/arithmetic.yaml"


def test_null_over_a_mapping_takes_its_place() -> None:
    overrides = ["experiment=demo", "data.validation=null"]
    overrides += ["data.train.split_validation_size=0.1"]
    found = origins(overrides)
    assert found["data.validation"] == COMMAND_LINE
    assert not any(key.startswith("data.validation.") for key in found)


@pytest.mark.parametrize(
    "overrides",
    [
        *([f"experiment={name}"] for name in ONE_OF_EACH_KIND),
        ["engine=nemo_rl", "cluster=a100_2x8", "model=nemotron_h_8b_dtensor"],
        [f"policy.model_name={quoted(HOSTILE)}", f"igrpo.prompt.system={quoted(HOSTILE)}"],
    ],
    ids=lambda overrides: overrides[-1][:60],
)  # fmt: skip
def test_the_dry_run_is_the_config_as_yaml(overrides: list[str]) -> None:
    config = load_config(overrides)
    text = train.dry_run_text(config, overrides)
    values = yaml.safe_load(text)
    expected = with_problems(config, 94_000 if "tableS1" in overrides[0] else 7_493).to_dict()
    schedules = values["policy"].pop("scheduler"), expected["policy"].pop("scheduler")
    assert all(schedules)
    for side in (values, expected):
        (side["policy"].get("megatron_cfg") or {}).pop("scheduler", None)
    assert values == expected
    body = text[: text.index("#\n# rollout budget")].splitlines()
    assert all("  # " in line or re.fullmatch(r" *[\w-]+:", line) for line in body)


def _files_of(overrides: list[str]) -> list[tuple[str, str, Any]]:
    """(key, file, value) of every number or truth value that a file writes out."""
    config = load_config(overrides)
    values = config.to_dict()
    found = []
    for path, origin in origins_of(config, overrides).items():
        value: Any = values
        for name in path:
            value = value[name]
        if origin.startswith("configs/") and ": " not in origin:
            if isinstance(value, int | float):
                found.append((".".join(path), origin, value))
    return found


def test_changing_a_value_in_its_file_changes_the_config(tmp_path: Path) -> None:
    """The file that is named is the one that decides, in each of the files of an experiment."""
    overrides = ["experiment=tableS1_openmath_nemotron_14b_igrpo"]
    chosen: dict[str, tuple[str, Any]] = {}
    for key, file, value in _files_of(overrides):
        chosen[file] = (key, value)
    assert len(chosen) >= 8
    copy = tmp_path / "configs"
    shutil.copytree(CONFIGS, copy)
    for file, (key, value) in chosen.items():
        original = (tmp_path / file).read_text(encoding="utf-8")
        changed = (not value) if isinstance(value, bool) else value + 1
        (tmp_path / file).write_text(_with_value(original, key, changed), encoding="utf-8")
        values: Any = composed_values(overrides, [copy], GROUPS)
        for name in key.split("."):
            values = values[name]
        assert values == changed, (file, key)
        (tmp_path / file).write_text(original, encoding="utf-8")


def _with_value(text: str, key: str, value: Any) -> str:
    """A config file with another value for a key of the whole config."""
    header = text.partition("\n")[0]
    package = header.removeprefix("# @package ") if header.startswith("# @package") else "_global_"
    content = yaml.safe_load(text)
    names = key.split(".")
    if package != "_global_":
        names = names[len(package.split(".")) :]
    node = content
    for name in names[:-1]:
        node = node[name]
    assert names[-1] in node
    node[names[-1]] = value
    return f"# @package {package}\n{yaml.safe_dump(content, sort_keys=False)}"


def test_a_leaf_without_an_origin_is_an_error() -> None:
    with pytest.raises(KeyError):
        annotated_yaml(load_config(["experiment=demo"]), {})

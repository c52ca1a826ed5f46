"""`igrpo train --dry-run`: the origin of every value is the file, override or code that set it."""

from __future__ import annotations

import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from composed import CONFIGS, config_of

from igrpo_nemo.cli import train
from igrpo_nemo.config import load_config, with_problems
from igrpo_nemo.config.compose import composed_values, quoted
from igrpo_nemo.config.origins import COMMAND_LINE, DERIVED, annotated_yaml, origins_of
from igrpo_nemo.config.section import at

TENSOR = "policy.megatron_cfg.tensor_model_parallel_size"
CONTEXT = "policy.generation.vllm_cfg.max_model_len"
HYBRID = ("experiment=table1_nemotron_h_8b_igrpo",)
DAPO = ("experiment=table2_dapo_igrpo",)
DEMO = ("experiment=demo_grpo",)
CHANGED = (
    *DAPO, "cluster=h100_2x8", "objective=gspo", "cluster.num_nodes=3", "igrpo.site.env={A: b}",
    "grpo.val_batch_size=${grpo.max_val_samples}", "policy.train_global_batch_size=128",
    "data.validation=null", "data.train.split_validation_size=0.1",
)  # fmt: skip
HOSTILE = "a: 'b' # c\n# d: [e, \"f\"]\n"


@cache
def origins(overrides: tuple[str, ...], config_dir: Path | None = None) -> dict[str, str]:
    """The origins by dotted path, as `--dry-run` has them."""
    config = load_config(overrides, config_dir) if config_dir else config_of(*overrides)
    found = origins_of(with_problems(config, 7_498), overrides, config_dir)
    return {".".join(path): origin for path, origin in found.items()}


@pytest.mark.parametrize(
    ("overrides", "key", "where"),
    [
        (HYBRID, "grpo.num_prompts_per_step", "configs/config.yaml"),
        (HYBRID, "logger.log_dir", "configs/experiment/table1_nemotron_h_8b_igrpo.yaml"),
        (HYBRID, TENSOR, "configs/model/nemotron_h_8b.yaml"),
        (DAPO, TENSOR, "configs/model/base/qwen2_7b.yaml"),
        (DAPO, "policy.model_name", "configs/model/deepseek_r1_distill_qwen_7b.yaml"),
        (DAPO, "policy.megatron_cfg.context_parallel_size", "configs/engine/nemo_rl.yaml"),
        (DAPO, CONTEXT, "configs/engine/nemo_rl.yaml: ${policy.max_total_sequence_length}"),
        (DAPO, "loss_fn.ratio_clip_min", "configs/objective/grpo.yaml"),
        (DAPO, "loss_fn.ratio_clip_max", "configs/objective/dapo.yaml"),
        (DAPO, "igrpo.updates_per_rollout", "configs/objective/dapo.yaml"),
        (DAPO, "igrpo.reward.format", "configs/reward/accuracy_format.yaml"),
        (DAPO, "igrpo.prompt.system", "configs/prompt/paper.yaml"),
        (DAPO, "cluster.num_nodes", "configs/cluster/a100_2x8.yaml"),
        (CHANGED, "igrpo.site.gpu", "configs/cluster/h100_2x8.yaml"),
        (CHANGED, "cluster.num_nodes", COMMAND_LINE),
        (CHANGED, "igrpo.site.env.A", COMMAND_LINE),
        (CHANGED, "policy.train_global_batch_size", COMMAND_LINE),
        (CHANGED, "data.validation", COMMAND_LINE),
        (CHANGED, "grpo.val_batch_size", f"{COMMAND_LINE}: ${{grpo.max_val_samples}}"),
        (CHANGED, "loss_fn.ratio_clip_max", "configs/objective/gspo.yaml"),
        (DEMO, "policy.optimizer.kwargs.lr", "configs/experiment/demo.yaml"),
        (DEMO, "logger.log_dir", "configs/experiment/demo_grpo.yaml"),
        (DEMO, "igrpo.feedback", "configs/feedback/none.yaml"),
        (DAPO, "igrpo.draft_prefetch", "default: igrpo_nemo/config/igrpo_keys.py"),
        (DAPO, "igrpo.site.max_restarts", "default: igrpo_nemo/config/igrpo_keys.py"),
        (DAPO, "data.train.drop_overlap", "default: igrpo_nemo/config/nemo_keys.py"),
    ],
)  # fmt: skip
def test_where_a_value_comes_from(overrides: tuple[str, ...], key: str, where: str) -> None:
    assert origins(overrides)[key] == where


def test_null_over_a_mapping_takes_its_place() -> None:
    assert not any(key.startswith("data.validation.") for key in origins(CHANGED))


def test_derived_values_say_so() -> None:
    assert {key for key, origin in origins(DAPO).items() if origin == DERIVED} == {
        "grpo.num_generations_per_prompt",
        "policy.train_global_batch_size",
        "policy.scheduler",
        "policy.megatron_cfg.scheduler.lr_decay_iters",
        "policy.megatron_cfg.scheduler.lr_warmup_iters",
        "policy.megatron_cfg.scheduler.lr_warmup_init",
    }
    assert origins(HYBRID)["igrpo.updates_per_rollout"] == DERIVED


def test_a_mapping_in_an_expression_gives_its_origin_to_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - demo\n  - _self_\n"
    file = tmp_path / "experiment" / "mine.yaml"
    file.write_text(text + "data:\n  validation: ${data.train}\n")
    found = origins(("experiment=mine",), tmp_path)
    assert found["data.validation.dataset_name"] == f"{file}: ${{data.train}}"
    assert found["data.train.dataset_name"] == "configs/data/arithmetic.yaml"


@pytest.mark.parametrize(
    "overrides",
    [
        DEMO,
        ("experiment=tableS1_openmath_nemotron_14b_igrpo",),
        ("experiment=table3_judge", "model=nemotron_h_8b_dtensor"),
        (f"policy.model_name={quoted(HOSTILE)}", f"igrpo.prompt.system={quoted(HOSTILE)}"),
    ],
    ids=lambda overrides: overrides[-1][:60],
)  # fmt: skip
def test_the_dry_run_is_the_config_as_yaml(overrides: tuple[str, ...]) -> None:
    config = config_of(*overrides)
    text = train.dry_run_text(config, overrides)
    values = yaml.safe_load(text)
    expected = with_problems(config, 94_000 if "tableS1" in overrides[0] else 7_498).to_dict()
    schedules = values["policy"].pop("scheduler"), expected["policy"].pop("scheduler")
    assert all(schedules)
    for side in (values, expected):
        (side["policy"].get("megatron_cfg") or {}).pop("scheduler", None)
    assert values == expected
    body = text[: text.index("#\n# rollout budget")].splitlines()
    assert all("  # " in line or re.fullmatch(r" *[\w-]+:", line) for line in body)


def test_changing_a_value_in_its_file_changes_the_config(tmp_path: Path) -> None:
    """The file that is named is the one that decides, in each of the files of an experiment."""
    overrides = ("experiment=tableS1_openmath_nemotron_14b_igrpo",)
    config = config_of(*overrides)
    values, chosen = config.to_dict(), {}
    for path, origin in origins_of(config, overrides).items():
        value = at(values, ".".join(path))
        if origin.startswith("configs/") and ": " not in origin and type(value) in (int, float):
            chosen[origin] = (".".join(path), value + 1)
    assert len(chosen) >= 6
    copy = tmp_path / "configs"
    shutil.copytree(CONFIGS, copy)
    for file, (key, changed) in chosen.items():
        text = (tmp_path / file).read_text(encoding="utf-8")
        (tmp_path / file).write_text(_with_value(text, key, changed), encoding="utf-8")
    composed = composed_values(overrides, [copy])
    assert {file: (key, at(composed, key)) for file, (key, _) in chosen.items()} == chosen


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
        annotated_yaml(config_of("experiment=demo"), {})

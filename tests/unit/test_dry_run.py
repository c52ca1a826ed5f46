"""`igrpo train --dry-run`: the resolved config, the files that it is made of, and the budget."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from composed import CONFIGS, config_of

from igrpo_nemo.cli import train
from igrpo_nemo.config import load_config, with_problems
from igrpo_nemo.config.compose import composed_values, merged_files, quoted

HOSTILE = "a: 'b' # c\n# d: [e, \"f\"]\n"


def test_the_files_are_those_of_hydra_in_its_order(tmp_path: Path) -> None:
    files = merged_files(["experiment=table2_dapo_igrpo", "cluster=h100_2x8", "objective=gspo"])
    order = ["config", "engine/nemo_rl", "model/base/qwen2_7b", "model/deepseek_r1_distill_qwen_7b"]
    order += ["objective/gspo", "prompt/paper", "cluster/h100_2x8", "experiment/table2_dapo_igrpo"]
    assert sorted(files.index(f"configs/{name}.yaml") for name in order)
    assert files[-1] == "configs/experiment/table2_dapo_igrpo.yaml"
    assert not any("objective/dapo" in file or "a100" in file for file in files)
    (tmp_path / "experiment").mkdir()
    mine = tmp_path / "experiment" / "mine.yaml"
    mine.write_text("# @package _global_\ndefaults:\n  - demo\n  - _self_\n")
    files = merged_files(["experiment=mine"], tmp_path)
    assert files[-2:] == ["configs/experiment/demo.yaml", str(mine)]
    text = train.dry_run_text(
        load_config(["experiment=mine"], tmp_path), ["experiment=mine"], tmp_path
    )
    assert f"#   {mine}\n#   command line\n" in text


def test_the_later_file_wins(tmp_path: Path) -> None:
    """The same key in one file of an experiment after the other."""
    overrides = ["experiment=tableS1_openmath_nemotron_14b_igrpo"]
    copy = tmp_path / "configs"
    shutil.copytree(CONFIGS, copy)
    texts = {name: (tmp_path / name).read_text("utf-8") for name in merged_files(overrides)}
    whole = [name for name, text in texts.items() if "@package _global_" in text]
    assert len(whole) > 3
    for seed, name in enumerate(whole[-3:], 1):
        values = yaml.safe_load(texts[name])
        values["grpo"] = {**values.get("grpo", {}), "seed": seed}
        (tmp_path / name).write_text(f"# @package _global_\n{yaml.safe_dump(values)}")
        assert composed_values(overrides, [copy])["grpo"]["seed"] == seed


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=demo_grpo"],
        ["experiment=tableS1_openmath_nemotron_14b_igrpo"],
        ["experiment=table3_judge", "model=nemotron_h_8b_dtensor"],
        [f"policy.model_name={quoted(HOSTILE)}", f"igrpo.prompt.system={quoted(HOSTILE)}"],
    ],
    ids=lambda overrides: overrides[-1][:60],
)
def test_the_dry_run_is_the_config_as_yaml(overrides: list[str]) -> None:
    config = config_of(*overrides)
    text = train.dry_run_text(config, overrides)
    values = yaml.safe_load(text)
    expected = with_problems(config, 94_000 if "tableS1" in overrides[0] else 7_498).to_dict()
    schedules = values["policy"].pop("scheduler"), expected["policy"].pop("scheduler")
    assert all(schedules)
    for side in (values, expected):
        (side["policy"].get("megatron_cfg") or {}).pop("scheduler", None)
    assert values == expected
    assert "\n#\n# rollout budget\n#   " in text

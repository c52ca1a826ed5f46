"""Fifty broken configs: each is refused in one line that names the key and a value that works.

Each case is an experiment, the overrides that break it, and the override that its message offers in
their place or beside them, after which the run must be accepted.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from composed import PLENTY, config_of, made

from igrpo_nemo.cli import main
from igrpo_nemo.errors import UserError
from igrpo_nemo.preflight import preflight

B7, B14 = "tableS3_igrpo", "table1_openmath_nemotron_14b_igrpo"
TENSOR = "policy.megatron_cfg.tensor_model_parallel_size"

CASES = yaml.safe_load(Path(__file__).with_name("broken_configs.yaml").read_text(encoding="utf-8"))
MISSPELT = CASES.pop("misspelt")
REPAIRED = [case for cases in CASES.values() for case in cases]


def refusals(experiment: str, overrides: list[str]) -> list[str]:
    try:
        config = made(f"experiment={experiment}", *overrides)
        plan = preflight(config, environ={}, free=lambda folder: PLENTY)
        assert plan.to_dict()["fits"] is plan.text().endswith("it fits\n")
        return plan.problems
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

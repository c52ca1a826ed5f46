"""What is derived of a config: steps, the rollout budget, the learning rate's schedule."""

from __future__ import annotations

import math

import pytest
from cases import cases
from composed import config_of

from igrpo_nemo.config import RolloutBudget, rollout_steps, with_problems
from igrpo_nemo.config.derive import scheduler_stages
from igrpo_nemo.errors import UserError

CASES = cases(__file__)

HF = ["policy.model_name=some/model"]


@pytest.mark.parametrize(("problems", "overrides", "steps"), CASES["steps"])
def test_steps_are_whole_batches_of_all_epochs(
    problems: int, overrides: list[str], steps: int
) -> None:
    assert rollout_steps(config_of(*HF, *overrides), problems) == steps


def test_budget_counts_both_stages() -> None:
    budget = RolloutBudget(config_of(*HF), 7500)
    assert (budget.drafts, budget.refinements, budget.steps) == (512, 512, 58)
    assert budget.max_tokens == 1024 * 4096
    text = "\n".join(budget.lines())
    assert "completions in all: 59,392" in text
    assert "steps: known when the data is loaded" in RolloutBudget(config_of(*HF)).lines()
    alone = RolloutBudget(config_of(*HF, "feedback=none"), 7500)
    assert (alone.drafts, alone.refinements, alone.trained_rows) == (1024, 0, 1024)
    dapo = RolloutBudget(config_of(*HF, "objective=dapo"), 7500)
    assert "dynamic sampling: at most 30 times these samples" in dapo.lines()


def test_schedule_is_derived_once_the_problems_are_counted() -> None:
    config = config_of(*HF)
    assert config.policy.scheduler is None
    ramp, decay, joint = with_problems(config, 7500).policy.scheduler or []
    assert ramp["kwargs"]["total_iters"] == 6 and joint == {"milestones": [6]}
    assert decay["kwargs"]["T_max"] == 52
    assert decay["kwargs"]["eta_min"] == pytest.approx(1e-7)


@pytest.mark.parametrize(("problems", "message"), CASES["too_few"])
def test_too_few_problems_for_a_batch(problems: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_problems(config_of(*HF), problems)


def test_a_given_schedule_is_kept() -> None:
    given = "policy.scheduler=[{name:torch.optim.lr_scheduler.ConstantLR,kwargs:{factor:1.0}}]"
    assert len(with_problems(config_of(*HF, given), 7500).policy.scheduler or []) == 1


def rates(overrides: list[str], updates: int) -> list[float]:
    """The learning rate of each update under the derived schedule, run by PyTorch."""
    torch = pytest.importorskip("torch")
    config = config_of("experiment=demo", *overrides)
    lr = config.policy.optimizer.kwargs.lr
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    stages = scheduler_stages(config, updates)
    parts = [
        getattr(torch.optim.lr_scheduler, s["name"].rpartition(".")[2])(optimizer, **s["kwargs"])
        for s in stages
        if "name" in s
    ]
    milestones = [m for s in stages for m in s.get("milestones", [])]
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones)
    seen = []
    for _ in range(updates + 1):
        seen.append(optimizer.param_groups[0]["lr"] / lr)
        optimizer.step()
        schedule.step()
    return seen


def test_cosine_schedule_rises_peaks_and_falls_to_the_minimum() -> None:
    values = rates([], 100)
    assert values[:3] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
    assert values[10] == pytest.approx(1.0)
    assert values[55] == pytest.approx(0.1 + 0.9 / 2)
    assert values[100] == pytest.approx(0.1)
    assert all(a < b for a, b in zip(values[:10], values[1:11], strict=True))
    assert all(a > b for a, b in zip(values[10:100], values[11:101], strict=True))


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5])
def test_megatron_warms_up_like_the_other_engines(ratio: float) -> None:
    """By its formula (Megatron-Core, OptimizerParamScheduler.get_lr) in the run's 58 steps."""
    changes = ["engine=nemo_rl", "cluster=a100_2x8", f"igrpo.schedule.warmup_ratio={ratio}"]
    megatron = with_problems(config_of(*HF, *changes), 7_500).policy.megatron_cfg or {}
    schedule, peak = megatron["scheduler"], megatron["optimizer"]["lr"]
    warmup, start = schedule["lr_warmup_iters"], schedule["lr_warmup_init"]
    assert (schedule["lr_decay_iters"], warmup) == (58, math.ceil(58 * ratio))
    expected = rates([changes[-1]], 58)[: warmup + 1]
    measured = [start + (peak - start) * step / warmup for step in range(warmup + 1) if warmup]
    assert [rate / peak for rate in measured] == pytest.approx(expected if warmup else [])
    assert start == (pytest.approx(peak / (warmup + 1)) if warmup else 0.0)


@pytest.mark.parametrize(("decay", "middle", "end"), [("linear", 0.55, 0.1), ("constant", 1, 1)])
def test_other_decays(decay: str, middle: float, end: float) -> None:
    values = rates([f"igrpo.schedule.decay={decay}"], 100)
    assert (values[55], values[100]) == (pytest.approx(middle), pytest.approx(end))


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_tiny_schedules_are_valid(updates: int) -> None:
    assert all(0 < value <= 1 for value in rates([], updates))
    assert rates(["igrpo.schedule.warmup_ratio=0.0"], updates)[0] == pytest.approx(1.0)

"""Group advantages against Eq. 4 written with the standard library, and the reward shaping."""

import itertools
import math
import statistics

import pytest
import torch

from igrpo_nemo.objectives.advantage import group_advantages
from igrpo_nemo.objectives.reward_shaping import (
    nonzero_groups,
    overlong_penalties,
    rewards_differ,
    scale_rewards,
)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def eq4(rewards: list[float], delta: float) -> list[float]:
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(reward - mean) / (std + delta) for reward in rewards]


@pytest.mark.parametrize("delta", [0.0, 1e-6, 0.5])
def test_advantages_are_eq4_in_every_group_whatever_the_row_order(delta):
    groups = {"a": [0.0, 1.0, 2.0, 2.0], "b": [0.25, 0.75], "c": [1.0, 0.0, 0.0]}
    rows = [(name, reward) for name, rewards in groups.items() for reward in rewards]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [rows[row] for row in order]
    got = group_advantages(
        double(*(reward for _, reward in shuffled)), [name for name, _ in shuffled], delta=delta
    )
    wanted = [value for rewards in groups.values() for value in eq4(rewards, delta)]
    assert got.tolist() == pytest.approx([wanted[row] for row in order], abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("delta", [0.0, 1e-6])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_equal_rewards_give_exactly_zero(dtype, delta, leave_one_out):
    for reward, size in itertools.product([0.0, 1.0, 0.1, 0.7, 0.83, -1 / 3, 1e4 / 7], [2, 3, 7]):
        rewards = torch.full((size,), reward, dtype=dtype)
        got = group_advantages(
            rewards, ["a"] * size, delta=delta, use_leave_one_out_baseline=leave_one_out
        )
        assert got.tolist() == [0.0] * size
        assert not rewards_differ(rewards.tolist())


def test_rewards_equal_up_to_rounding_are_equal():
    rewards = double(0.1 + 0.2, 0.3, 0.15 * 2)
    assert len(set(rewards.tolist())) > 1
    assert group_advantages(rewards, ["a"] * 3, delta=0).tolist() == [0.0] * 3
    assert nonzero_groups(rewards.tolist(), ["a"] * 3) == {"a": False}


def test_close_but_different_rewards_keep_their_precision():
    """A one-pass E[x^2] - E[x]^2 in fp32 has no correct digit here."""
    rewards = torch.tensor([0.83, 0.8301, 0.8302, 0.8301])
    wanted = eq4(rewards.double().tolist(), 0.0)
    assert group_advantages(rewards, ["a"] * 4, delta=0).tolist() == pytest.approx(wanted, rel=1e-6)


def test_dr_grpo_subtracts_the_mean_only():
    got = group_advantages(double(0, 1, 1, 2, 4, 6), list("aaaabb"), normalize_rewards=False)
    assert got.tolist() == [-1, 0, 0, 1, -1, 1]


def test_leave_one_out_takes_mean_and_std_of_the_others():
    rewards = [0.0, 1.0, 0.5, 2.0]
    got = group_advantages(double(*rewards), ["a"] * 4, use_leave_one_out_baseline=True, delta=1e-6)
    for row, advantage in enumerate(got.tolist()):
        others = rewards[:row] + rewards[row + 1 :]
        wanted = (rewards[row] - statistics.fmean(others)) / (statistics.stdev(others) + 1e-6)
        assert advantage == pytest.approx(wanted, abs=1e-13)


def test_leave_one_out_stays_undivided_where_the_others_do_not_vary():
    got = group_advantages(double(0.7, 0.7, 0.7, 1.7), ["a"] * 4, use_leave_one_out_baseline=True)
    assert float(got[3]) == pytest.approx(1.0, abs=1e-13)
    pair = group_advantages(double(0, 1), ["a"] * 2, use_leave_one_out_baseline=True, delta=0)
    assert pair.tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("rewards", "wanted"),
    [
        (torch.tensor([0, 1, 1, 0], dtype=torch.bfloat16), torch.bfloat16),
        (torch.tensor([0, 1, 1, 0], dtype=torch.float64), torch.float64),
    ],
)
def test_the_result_keeps_a_float_dtype(rewards, wanted):
    got = group_advantages(rewards, ["a"] * 4)
    assert got.dtype == wanted
    assert got.tolist() == pytest.approx([-0.866, 0.866, 0.866, -0.866], abs=0.004)


def test_bad_groups_and_rewards_are_named():
    with pytest.raises(ValueError, match=r"group 'q7' has a single row"):
        group_advantages(double(0, 1, 1), ["a", "a", "q7"])
    with pytest.raises(ValueError, match=r"the reward of row 1 is nan"):
        group_advantages(double(0, math.nan), ["a", "a"])
    with pytest.raises(ValueError):
        group_advantages(double(0, 1), ["a", "a", "a"])


def test_nonzero_groups_are_those_with_a_nonzero_advantage():
    groups = ["b", "a", "b", "a", "c", "c", "d"]
    rewards = [1.0, 0.5, 1.0, 0.0, 0.2, 0.2, 3.0]
    assert nonzero_groups(rewards, groups) == {"b": False, "a": True, "c": False, "d": False}
    assert list(nonzero_groups(rewards, groups)) == ["b", "a", "c", "d"]
    advantages = group_advantages(torch.tensor(rewards[:-1]), groups[:-1])
    assert [bool(value) for value in advantages] == [group == "a" for group in groups[:-1]]
    with pytest.raises(ValueError):
        nonzero_groups([1.0], ["a", "b"])


def test_reward_scaling_is_linear_and_clips_to_the_source_range():
    two_parts = {"source_min": 0.0, "source_max": 2.0, "target_min": -1.0, "target_max": 1.0}
    assert scale_rewards([0.0, 0.5, 1.0, 2.0], **two_parts) == [-1.0, -0.5, 0.0, 1.0]
    one_part = {**two_parts, "source_max": 1.0}
    assert scale_rewards([-3.0, 0.0, 1.0, 2.0], **one_part) == [-1.0, -1.0, 1.0, 1.0]
    assert scale_rewards([0.25, 1.0]) == [0.25, 1.0]


def test_overlong_punishment_falls_from_the_buffer_on():
    got = overlong_penalties(
        [0, 80, 81, 90, 100, 500],
        max_response_length=100,
        overlong_buffer_length=20,
        overlong_buffer_penalty=2.0,
    )
    assert got == pytest.approx([0.0, 0.0, -0.1, -1.0, -2.0, -2.0])

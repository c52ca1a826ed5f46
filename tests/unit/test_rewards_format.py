"""The format reward: all of the structure or nothing."""

import pytest

from igrpo_nemo.rewards import format_reward

WHOLE = "<think>a</think><answer>5</answer>"


@pytest.mark.parametrize(
    "text", [WHOLE, f"\n {WHOLE} \n", "<think>\na\n</think>\n\n<answer>\n5\n</answer>"]
)
def test_the_full_structure_is_rewarded(text):
    assert format_reward(text) == 1.0
    assert format_reward(text, thinking_open=True) == 1.0


def test_a_template_that_opened_the_thinking_needs_no_second_tag():
    text = WHOLE.removeprefix("<think>")
    assert format_reward(text, thinking_open=True) == 1.0
    assert format_reward(text) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "<answer>5</answer>",
        "<think>a</think>5",
        "<think>a</think><answer>5",
        "<think>a<answer>5</answer>",
        "<think></think><answer>5</answer>",
        "<think>a</think><answer> </answer>",
        f"so {WHOLE}",
        f"{WHOLE} so",
        "<think>a</think> so <answer>5</answer>",
        "<think>a</think><answer>5</answer><answer>6</answer>",
        "<think>a</think></think><answer>5</answer>",
        "<think><think>a</think><answer>5</answer>",
        "<answer>5</answer><think>a</think>",
        "<think>a <answer>4</answer></think><answer>5</answer>",
        "<Think>a</Think><Answer>5</Answer>",
    ],
)
def test_anything_less_or_more_is_not(text):
    assert format_reward(text) == 0.0

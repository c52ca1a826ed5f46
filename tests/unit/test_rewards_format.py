"""The format reward: all of the structure or nothing. A verdict: one word or nothing."""

import pytest

from igrpo_nemo.rewards.extract import format_reward, target_score
from igrpo_nemo.types import Target

WHOLE = "<think>a</think><answer>5</answer>"
YES = Target("yes", ("yes", "no"), 1.5)


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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<think>no, or so</think><answer>Yes</answer>", "yes"),
        ("<think></think><answer> YES. </answer>", "yes"),
        ("<think></think><answer>Yes, it is not wrong</answer>", "yes"),
        ("It holds, so \\boxed{\\text{Yes}}", "yes"),
        ("<answer>No</answer>", "no"),
        ("<answer>No</answer> then <answer>yes</answer>", "yes"),
        ("<answer>42</answer>", None),
        ("<answer>yesterday</answer>", None),
        ("<answer></answer>", None),
        ("Yes", None),
        ("<think><answer>Yes</answer>", None),
        ("", None),
    ],
)
def test_the_answer_must_begin_with_the_word(text, said):
    score = target_score(YES, text)
    assert score.reason == (f"said_{said}" if said else "no_verdict")
    assert score.correct == (said == "yes")
    assert score.reward == (1.5 if said == "yes" else 0.0)


def test_a_right_word_that_earns_nothing_is_still_right():
    score = target_score(Target("no", ("yes", "no"), 0.0), "<answer>no</answer>")
    assert score.reward == 0 and score.correct


def test_a_thinking_part_that_the_template_opened_hides_the_answer_in_it():
    text = "<answer>Yes</answer></think><answer>No</answer>"
    assert target_score(YES, text, thinking_open=True).reason == "said_no"

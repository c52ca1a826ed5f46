import pytest

from igrpo_nemo.rewards.target import target_score
from igrpo_nemo.types import Target

YES = Target("yes", ("yes", "no"), 1.5)


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

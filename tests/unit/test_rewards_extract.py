"""Where the answer of a completion is found, and where it is not."""

import pytest

from igrpo_nemo.rewards.extract import AnswerFormat, extract_answer, last_boxed, visible_text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>a</think><answer>5</answer>", "5"),
        ("<answer>4</answer> no: <answer> 5 </answer>", "5"),
        ("so \\boxed{4}, hence \\boxed{5}.", "5"),
        ("\\boxed{\\frac{1}{\\sqrt{2}}}", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed {5}", "5"),
        ("\\boxed\n{ 5 }", "5"),
        ("\\fbox{5}", "5"),
        ("it is $\\boxed 5$", "5"),
        ("it is $\\boxed\\frac{1}{2}$", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("\\boxed{3} and then \\boxed{12", "3"),
        ("<answer>3</answer> wait <answer>12", "3"),
        ("<answer>\\boxed{5}</answer>", "5"),
        ("<answer>\\boxed{5</answer>", "\\boxed{5"),
        ("<answer></answer> \\boxed{5}", "5"),
        ("\\boxed{4} <answer>5</answer>", "5"),
        ("\\boxedx{5}", None),
        ("\\boxed{}", None),
        ("\\boxed{12", None),
        ("<answer>12", None),
        ("5", None),
        ("", None),
        ("<think>\\boxed{5}</think>", None),
        ("<think><answer>5</answer>", None),
        ("<think>\\boxed{4}</think> \\boxed{5}", "5"),
        ("\\boxed{4}</think>\\boxed{5}", "5"),
        ("\\boxed{4}</think> none", None),
        ("<think>a</think><answer>5</answer><think>\\boxed{6}</think>", "5"),
        ("<think>a<think>b</think><answer>5</answer></think>", "5"),
    ],
)
def test_the_last_whole_answer_outside_the_thinking_counts(text, answer):
    assert extract_answer(text) == answer


def test_a_prompt_that_opens_the_thinking_hides_what_comes_before_its_end():
    assert extract_answer("\\boxed{4}", thinking_open=True) is None
    assert extract_answer("\\boxed{4}</think>\\boxed{5}", thinking_open=True) == "5"
    assert visible_text("a<think>b</think>c", thinking_open=False) == "a\nc"


def test_formats_look_only_where_they_say():
    text = "\\boxed{4} <answer>5</answer>"
    assert extract_answer(text, AnswerFormat.TAGS) == "5"
    assert extract_answer(text, AnswerFormat.BOXED) == "4"
    assert extract_answer("\\boxed{4}", AnswerFormat.TAGS) is None
    assert extract_answer("<answer>4</answer>", AnswerFormat.BOXED) is None


def test_a_box_without_braces_at_the_end_of_a_truncated_text_may_go_on():
    assert extract_answer("it is \\boxed 12", truncated=True) is None
    assert extract_answer("it is \\boxed 12", truncated=False) == "12"
    assert extract_answer("it is $\\boxed 12$", truncated=True) == "12"


@pytest.mark.parametrize(
    ("text", "joined"),
    [
        ("\\boxed{1} and \\boxed{2}", "1,2"),
        ("\\boxed{1}, \\boxed{2} \\text{ or } \\boxed{3}", "1,2,3"),
        ("\\boxed{7} is a lemma. " + "x" * 80 + " \\boxed{1}, \\boxed{2}", "1,2"),
        ("first \\boxed{1}" + " then much text without a break" * 2 + "\\boxed{2}", "2"),
        ("\\boxed{2} i.e. \\boxed{2}", "2"),
    ],
)
def test_boxes_that_stand_together_are_one_answer_when_several_are_asked_for(text, joined):
    assert last_boxed(text, several=True) == joined
    assert last_boxed(text) == joined.rpartition(",")[2]

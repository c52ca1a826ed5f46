"""Verdicts by the table beside this file: extraction, format, reasons, references, the fast path;
`answer_pairs.txt`, labelled by mathematics; published labels; references against themselves."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cases import cases
from shared_data import shared_rows

from igrpo_nemo.rewards.accuracy import (
    Reason,
    Verdict,
    find_answer,
    full_verdict,
    gold_verdict,
    is_missing_reference,
    quick_verdict,
    verify_completion,
)
from igrpo_nemo.rewards.extract import (
    AnswerFormat,
    extract_answer,
    format_reward,
    last_boxed,
    target_score,
    visible_parts,
)
from igrpo_nemo.rewards.literal import read_literal
from igrpo_nemo.types import Target

CASES = cases(__file__)
YES = Target("yes", ("yes", "no"), 1.5)


@pytest.mark.parametrize(("text", "answer"), CASES["extract"])
def test_the_last_whole_answer_outside_the_thinking_counts(text, answer):
    assert extract_answer(text) == answer


def test_what_the_prompt_opened_the_format_and_the_end_decide_where_is_looked():
    both = "\\boxed{4}</think>\\boxed{5}"
    assert extract_answer("\\boxed{4}", thinking_open=True) is None
    assert extract_answer(both, thinking_open=True) == "5"
    assert visible_parts("a<think>b</think>c", thinking_open=False) == ["a", "c"]
    text = "\\boxed{4} <answer>5</answer>"
    assert extract_answer(text, AnswerFormat.TAGS) == "5"
    assert extract_answer(text, AnswerFormat.BOXED) == "4"
    assert extract_answer("\\boxed{4}", AnswerFormat.TAGS) is None
    assert extract_answer("<answer>4</answer>", AnswerFormat.BOXED) is None
    # A box without braces at the end of a truncated text may go on.
    assert extract_answer("it is \\boxed 12", truncated=True) is None
    assert extract_answer("it is \\boxed 12", truncated=False) == "12"
    assert extract_answer("it is $\\boxed 12$", truncated=True) == "12"


@pytest.mark.parametrize(("text", "joined"), CASES["boxes"])
def test_boxes_that_stand_together_are_one_answer_when_several_are_asked_for(text, joined):
    assert last_boxed(text, several=True) == joined
    assert last_boxed(text) == joined.rpartition(",")[2]


def test_the_format_is_all_of_the_structure_or_nothing():
    for text in CASES["format_whole"]:
        assert format_reward(text) == format_reward(text, thinking_open=True) == 1.0, text
        opened = text.replace("<think>", "", 1)
        assert (format_reward(opened, thinking_open=True), format_reward(opened)) == (1.0, 0.0)
    assert [text for text in CASES["format_broken"] if format_reward(text) != 0.0] == []


@pytest.mark.parametrize(("text", "said"), CASES["said"])
def test_a_verdict_must_begin_with_its_word(text, said):
    score = target_score(YES, text)
    assert score.reason == (f"said_{said}" if said else "no_verdict")
    assert score.correct == (said == "yes")
    assert score.reward == (1.5 if said == "yes" else 0.0)


def test_a_right_word_may_earn_nothing_and_opened_thinking_hides_one():
    score = target_score(Target("no", ("yes", "no"), 0.0), "<answer>no</answer>")
    assert score.reward == 0 and score.correct
    text = "<answer>Yes</answer></think><answer>No</answer>"
    assert target_score(YES, text, thinking_open=True).reason == "said_no"


LONG = [("5", "\\boxed{" + "9" * 3_000 + "}", Reason.TOO_LONG)]
DEEP = [("5", "<answer>" + "(" * 30 + "5" + ")" * 30 + "</answer>", Reason.UNPARSEABLE)]


@pytest.mark.parametrize(("gold", "text", "reason"), [*CASES["reasons"], *LONG, *DEEP])
def test_every_verdict_has_its_reason(gold, text, reason):
    assert verify_completion(gold, text).reason == reason


def test_references_that_cannot_serve_are_told_and_nothing_equals_them():
    golds = ["5", "\\frac{1}{2}", "", "  ", "\\frac{}{}", "9" * 3_000]
    told = ["match", "match", "no_answer", "no_answer", "unparseable", "too_long"]
    assert [gold_verdict(gold) for gold in golds] == told
    for gold in CASES["missing_references"]:
        assert is_missing_reference(gold), gold
        assert gold_verdict(gold) in (Reason.NO_ANSWER, Reason.NO_REFERENCE), gold
        verdict = verify_completion(gold, f"<answer>{gold}</answer>")
        assert (verdict.reason, verdict.correct) == (Reason.NO_REFERENCE, False), gold
    assert not any(map(is_missing_reference, CASES["references"]))


@pytest.mark.parametrize(("gold", "answer", "verdict"), CASES["quick"])
def test_what_the_fast_path_decides(gold, answer, verdict):
    assert quick_verdict(gold, answer) == verdict


def test_texts_that_are_no_plain_numbers_are_left_alone():
    texts = ["", "-", ".", "1e5", "٣", "1 000", "1,2", "5.", "\\frac{1}{0}", "3\\frac{4}{2}", "E"]
    assert [text for text in texts if read_literal(text) is not None] == []


def pairs() -> Iterator[tuple[str, str, str, bool]]:
    """Kind, reference, completion, label. An answer that begins with `@` is plain text in tags."""
    kind = ""
    for line in (Path(__file__).parent / "answer_pairs.txt").read_text("utf-8").splitlines():
        if line.startswith("# "):
            kind = line[2:]
        elif line:
            label, _, rest = line.partition(" | ")
            gold, _, answer = rest.partition(" <- ")
            text = f"<answer>{answer[1:]}</answer>" if answer[0] == "@" else f"\\boxed{{{answer}}}"
            yield kind, gold, text, label == "1"


@pytest.mark.parametrize("kind", dict.fromkeys(pair[0] for pair in pairs()))
def test_no_verdict_is_wrong_and_the_fast_path_agrees(kind):
    for _, gold, text, equal in (pair for pair in pairs() if pair[0] == kind):
        answer = find_answer(gold, text)
        if isinstance(answer, Verdict):
            assert not equal, (gold, text)
            continue
        full = full_verdict(gold, answer)
        assert (full is Reason.MATCH) == equal, (gold, text)
        assert quick_verdict(gold, answer) in (None, full), (gold, text)


def test_labels_of_the_math_completions():
    rows = shared_rows("completions_math_qwen_100x8.jsonl")
    different = [
        (row["idx"], sample)
        for row in rows
        for sample, (text, label) in enumerate(zip(row["code"], row["score"], strict=True))
        if verify_completion(row["answer"], text).correct != label
    ]
    # The label is wrong: 49,994/7 + 20,006/7 is 10,000, which is what the completion says.
    assert different == [(72, 7)]


def test_labels_of_the_gsm8k_completions():
    count, different = 0, []
    for row in shared_rows("completions_gsm8k_openai.jsonl"):
        gold = row["ground_truth"].rpartition("A:")[2].strip()
        for name, solution in row.items():
            if isinstance(solution, dict):
                text = solution["solution"]
                answer = text.rpartition("A:")[2].strip() if "A:" in text else ""
                verdict = verify_completion(gold, f"{text}<answer>{answer}</answer>")
                count += 1
                if verdict.correct != solution["is_correct"]:
                    different.append((row["question"][:40], name))
    assert (count, different) == (5_276, [])


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(("math500", "answer"), ("aime24_skills", "expected_answer"), ("amc23", "answer")),
        *(("minerva_math_deepseek_ocw", "answer"), ("gsm8k_test", "answer")),
    ],
)
def test_references_are_equal_to_themselves(name, key):
    rows = shared_rows(f"{name}.jsonl")
    golds = [str(row[key]).rpartition("####")[2].strip() for row in rows]
    for gold in golds:
        assert verify_completion(gold, f"<answer>{gold}</answer>").correct, gold
        assert verify_completion(gold, f"so it is $\\boxed{{{gold}}}$.").correct, gold
    # The fast path called them equal; math-verify does too.
    assert all(full_verdict(gold, gold) is Reason.MATCH for gold in golds[:150])

"""Verdicts: reasons, math-verify's own pairs, published labels, references against themselves."""

import pytest
from shared_data import shared_rows

from igrpo_nemo.rewards.accuracy import (
    Reason,
    full_verdict,
    gold_verdict,
    verify_completion,
)


@pytest.mark.parametrize(
    ("gold", "text", "reason"),
    [
        ("\\frac{\\sqrt{3}}{2}", "<answer>$\\sqrt{3}/2$</answer>", Reason.MATCH),
        ("x + 1", "\\boxed{1 + x}", Reason.MATCH),
        ("(1, 2)", "\\boxed{(2, 1)}", Reason.MISMATCH),
        ("1, -2", "\\boxed{-2} and \\boxed{1}", Reason.MATCH),
        ("18", "<answer>18 dollars</answer>", Reason.MATCH),
        ("18", "<answer>The answer is 18.</answer>", Reason.MATCH),
        ("18", "<answer>**18**</answer>", Reason.MATCH),
        ("5", "<answer>x = 5</answer>", Reason.MATCH),
        ("1000", "\\boxed{1\\,000}", Reason.MATCH),
        ("a + b + c", "\\boxed{c + b + a}", Reason.MATCH),
        ("237.5\\%", "\\boxed{237.5\\%}", Reason.MATCH),
        ("1 - \\frac{1}{\\mathrm{e}}", "\\boxed{1 + \\frac{1}{\\mathrm{e}}}", Reason.MISMATCH),
        ("\\text{Evelyn}", "\\boxed{Evelyn}", Reason.MATCH),
        ("5", "I think it is 5", Reason.NO_ANSWER),
        ("5", "<think>\\boxed{5}</think>", Reason.NO_ANSWER),
        ("5", "\\boxed{" + "9" * 3_000 + "}", Reason.TOO_LONG),
        ("5", "\\boxed{\\frac{}{}}", Reason.UNPARSEABLE),
        ("5", "<answer>" + "(" * 30 + "5" + ")" * 30 + "</answer>", Reason.UNPARSEABLE),
    ],
)
def test_every_verdict_has_its_reason(gold, text, reason):
    assert verify_completion(gold, text).reason is reason


def test_references_that_cannot_serve_are_told():
    golds = ["5", "\\frac{1}{2}", "", "  ", "\\frac{}{}", "9" * 3_000]
    assert [gold_verdict(gold) for gold in golds] == [
        *(Reason.MATCH, Reason.MATCH, Reason.NO_ANSWER, Reason.NO_ANSWER),
        *(Reason.UNPARSEABLE, Reason.TOO_LONG),
    ]


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
        ("math500.jsonl", "answer"),
        ("aime24_skills.jsonl", "expected_answer"),
        ("amc23.jsonl", "answer"),
        ("minerva_math_deepseek_ocw.jsonl", "answer"),
        ("gsm8k_test.jsonl", "answer"),
    ],
)
def test_references_are_equal_to_themselves(name, key):
    golds = [str(row[key]).rpartition("####")[2].strip() for row in shared_rows(name)]
    for gold in golds:
        assert verify_completion(gold, f"<answer>{gold}</answer>").correct, gold
        assert verify_completion(gold, f"so it is $\\boxed{{{gold}}}$.").correct, gold
    # The fast path called them equal; math-verify does too.
    assert all(full_verdict(gold, gold) is Reason.MATCH for gold in golds[:150])

"""The real `ns eval` against a server that knows the answers: every style of reply, both profiles.

Expected numbers are counted by hand in the comments, for two samples: each sample is a process of
NeMo-Skills', whose start takes ten seconds.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from answer_stub import Reply, Stub
from skills_runs import evaluate, write_problems

from igrpo_nemo.evaluation.results import BenchmarkResults, read_results
from igrpo_nemo.evaluation.skills.data import BENCHMARKS, checked_rows, write_benchmark
from igrpo_nemo.evaluation.skills.program import SkillsEnvironment

pytestmark = pytest.mark.timeout(600)

GOLD = "4"
STYLES = {  #                                                                  tags       boxed
    "tags": r"<answer>4</answer>",  #                                          right      none
    "boxed": r"It is \boxed{4}.",  #                                           none       right
    "both": r"It is \boxed{4}. <answer>4</answer>",  #                         right      right
    "thinking": r"<think>\boxed{9} <answer>9</answer></think>\boxed{4} <answer> 4 </answer>",
    "opened": r"<answer>9</answer></think>\boxed{4} <answer>4</answer>",  #    right      right
    "truncated": r"It is \boxed{4 and <answer>4",  #                           none       none
    "unclosed": r"<think>perhaps \boxed{4} or <answer>4</answer>",  #          none       right
    "inside": r"<think>\boxed{4} <answer>4</answer></think>I cannot say.",  #  none       none
    "wrong": r"\boxed{5} <answer>5</answer>",  #                               wrong      wrong
    "empty": "",  #                                                            none       none
}
NAMES = list(STYLES)
TOKENS = {name: 10 + index for index, name in enumerate(NAMES)}
# Problem i < 10 is answered with the i-th style and then the next one, the last one with both.
OUTVOTED = ("both", "wrong")
# 11 problems with two samples. Of the 22 replies of answer_tags 9 are right, 10 have no answer.
# Right once or twice: i = 0 to 4, 9, 10. Votes: right alone for i = 0 to 4 and 9 (with "empty"),
# a tie of right and wrong for i = 10. Of boxed's 11 are right, 8 have none; right once or twice for
# all but i = 7, 8, 9: right alone for seven, half of i = 10.
EXPECTED = {
    "answer_tags": {"avg": 9 / 22, "none": 10 / 22, "pass": 7 / 11, "majority": 6.5 / 11},
    "boxed": {"avg": 11 / 22, "none": 8 / 22, "pass": 8 / 11, "majority": 7.5 / 11},
}
RIGHT = {
    "answer_tags": {"tags", "both", "thinking", "opened"},
    "boxed": {"boxed", "both", "thinking", "opened", "unclosed"},
}
NO_ANSWER = {
    "answer_tags": {"boxed", "truncated", "unclosed", "inside", "empty"},
    "boxed": {"tags", "truncated", "inside", "empty"},
}
CHOICES = {
    "<think>A or <answer>A</answer></think><answer>B</answer>": "right",
    "<answer>The answer is (B).</answer>": "right",  # the letter in it
    r"\boxed{B}": "none",  # not in the tags
    "Answer: B": "right",  # NeMo-Skills falls back on such a line
    "<answer>C</answer>": "wrong",
    "": "none",
}


def style(index: int, seed: int) -> str:
    return OUTVOTED[seed] if index == len(NAMES) else NAMES[(index + seed) % len(NAMES)]


def answer(problem: str, seed: int) -> Reply:
    benchmark, index = problem.split()[0], int(problem.split()[-1].rstrip("?"))
    if benchmark == "choice":
        return Reply(list(CHOICES)[index % len(CHOICES)])
    name = style(index, seed)
    return Reply(STYLES[name], TOKENS[name], truncated=name in ("truncated", "unclosed"))


def write_multiple_choice(data: Path) -> None:
    rows = [
        {"problem": f"choice problem {i}?", "expected_answer": "B", "A": "x", "B": "y", "C": "z"}
        for i in range(198)
    ]
    write_benchmark(data, "gpqa", checked_rows(BENCHMARKS["gpqa"], rows, "made"))


@pytest.mark.parametrize("profile", ["answer_tags", "boxed"])
def test_every_reply_style(profile: str, skills: SkillsEnvironment, tmp_path: Path) -> None:
    data, out, benchmarks = tmp_path / "data", tmp_path / "out", "styles:2"
    write_problems(data, "styles", [GOLD] * (len(NAMES) + 1))
    if profile == "answer_tags":
        write_multiple_choice(data)
        benchmarks += ",gpqa:1"
    with Stub(answer) as server:
        ended = evaluate(
            *("--address", server.address, "--data-dir", str(data), "--out", str(out)),
            *("--benchmarks", benchmarks, f"igrpo.evaluation.profile={profile}"),
            "policy.tokenizer.chat_template_kwargs={enable_thinking: false, mark: 'a b'}",
            env=skills.bin.parent,
        )
    assert ended.code == 0, ended.err
    results = read_results(out)
    one, of_it = results.benchmarks["styles"], EXPECTED[profile]
    check_rows(one, profile)
    average = one.metrics["pass@1[avg-of-2]"]
    assert average["num_entries"] == len(one.problems) == 11
    assert average["symbolic_correct"] == pytest.approx(100 * of_it["avg"])
    assert average["no_answer"] == pytest.approx(100 * of_it["none"])
    assert one.metrics["pass@2"]["symbolic_correct"] == pytest.approx(100 * of_it["pass"])
    assert one.metrics["majority@2"]["symbolic_correct"] == pytest.approx(100 * of_it["majority"])
    assert f"{100 * of_it['avg']:.2f}%" in ended.out
    if profile == "answer_tags":
        check_multiple_choice(results.benchmarks["gpqa"])
    check_requests(server, profile, 22 + 198 * (profile == "answer_tags"))


def check_rows(one: BenchmarkResults, profile: str) -> None:
    """Verdict, missing answer, tokens and truncation of every single reply."""
    for index in range(len(one.problems)):
        for seed in range(2):
            name = style(index, seed)
            assert one.correct_P_K[index, seed] == (name in RIGHT[profile]), name
            assert one.no_answer_P_K[index, seed] == (name in NO_ANSWER[profile]), name
            assert one.tokens_P_K[index, seed] == TOKENS[name]
            assert one.truncated_P_K[index, seed] == (name in ("truncated", "unclosed"))


def check_multiple_choice(one: BenchmarkResults) -> None:
    assert one.metrics["pass@1"]["symbolic_correct"] == pytest.approx(50)
    assert one.metrics["pass@1"]["no_answer"] == pytest.approx(100 / 3)
    verdicts = one.correct_P_K[:, 0].reshape(33, len(CHOICES))
    assert (verdicts == [verdict == "right" for verdict in CHOICES.values()]).all()


def check_requests(stub: Stub, profile: str, asked: int) -> None:
    """Each problem was asked once a seed, with the paper's sampling and the profile's prompt."""
    assert len(stub.asked) == asked and set(stub.asked.values()) == {1}
    assert set(stub.answered.values()) == {1}
    for body in stub.bodies:
        assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.6, 0.95, 65_000)
        assert body["presence_penalty"] == 0 and "top_k" not in body
        assert body["chat_template_kwargs"] == {"enable_thinking": False, "mark": "a b"}
        roles = [message["role"] for message in body["messages"]]
        text = body["messages"][-1]["content"]
        if profile == "boxed":
            assert roles == ["user"] and r"\boxed{}" in text
        else:
            assert roles == ["system", "user"] and text.endswith("?") and "\n" not in text
            assert "<think>...</think><answer>...</answer>" in body["messages"][0]["content"]

"""The real `ns eval` against a server that knows the answers: every style of reply, both profiles.

Expected numbers are counted by hand in the comments, for benchmarks of 4 samples: each sample is a
process of NeMo-Skills', whose start takes seconds.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from answer_stub import Reply, Stub
from skills_runs import evaluate, write_problems

from igrpo_nemo.evaluation.results import BenchmarkResults, read_results
from igrpo_nemo.evaluation.skills.data import BENCHMARKS, checked_rows, write_benchmark
from igrpo_nemo.evaluation.skills.program import SkillsEnvironment

pytestmark = pytest.mark.timeout(1800)

GOLD, WRONG = "4", "5"
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
# "seeds": right, wrong, wrong, empty for the first problem; right, right, wrong, truncated.
SEEDS = (("both", "wrong", "wrong", "empty"), ("both", "both", "wrong", "truncated"))


def style(problem: str, seed: int) -> str:
    benchmark, index = problem.split()[0], int(problem.split()[-1].rstrip("?"))
    if benchmark == "rotating":
        return NAMES[(index + seed) % len(NAMES)]
    return SEEDS[index][seed]


def answer(problem: str, seed: int) -> Reply:
    name = style(problem, seed)
    return Reply(STYLES[name], TOKENS[name], truncated=name in ("truncated", "unclosed"))


EXPECTED = {
    "answer_tags": {
        # 4 of 10 styles are right, 5 have no answer. Four styles in a row from the i-th on: none
        # right for i = 5, 6; a tie of right and wrong for i = 7, 8; a wrong one alone for i = 5, 6.
        "rotating": {"avg": 40, "pass": 80, "majority": 70, "none": 50},
        # 1 and 2 of 4 are right; wrong outvotes right in the first problem.
        "seeds": {"avg": 37.5, "pass": 100, "majority": 50, "none": 25},
    },
    "boxed": {
        # None right for i = 7; ties for i = 5, 6, 8; wrong alone for i = 7.
        "rotating": {"avg": 50, "pass": 90, "majority": 75, "none": 40}
    },
}
RIGHT = {
    "answer_tags": {"tags", "both", "thinking", "opened"},
    "boxed": {"boxed", "both", "thinking", "opened", "unclosed"},
}
NO_ANSWER = {
    "answer_tags": {"boxed", "truncated", "unclosed", "inside", "empty"},
    "boxed": {"tags", "truncated", "inside", "empty"},
}


@pytest.mark.parametrize("profile", ["answer_tags", "boxed"])
def test_every_reply_style(profile: str, skills: SkillsEnvironment, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    sizes = {"rotating": len(NAMES), "seeds": len(SEEDS)}
    expected = EXPECTED[profile]
    for name in expected:
        write_problems(data, name, [GOLD] * sizes[name])
    chosen = ",".join(f"{name}:4" for name in expected)
    with Stub(answer) as server:
        ended = evaluate(
            *("--address", server.address, "--data-dir", str(data), "--out", str(out)),
            *("--benchmarks", chosen, f"igrpo.evaluation.profile={profile}"),
            "policy.tokenizer.chat_template_kwargs={enable_thinking: false, mark: 'a b'}",
            env=skills.bin.parent,
            timeout=1700,
        )
    assert ended.code == 0, ended.err
    results = read_results(out)
    assert list(results.benchmarks) == list(expected)
    for name, one in results.benchmarks.items():
        check_rows(one, profile)
        of_it = expected[name]
        average = one.metrics["pass@1[avg-of-4]"]
        assert average["num_entries"] == len(one.problems)
        assert average["symbolic_correct"] == pytest.approx(of_it["avg"])
        assert average["no_answer"] == pytest.approx(of_it["none"])
        assert one.metrics["pass@4"]["symbolic_correct"] == pytest.approx(of_it["pass"])
        assert one.metrics["majority@4"]["symbolic_correct"] == pytest.approx(of_it["majority"])
        assert f"{of_it['avg']:.2f}%" in ended.out
    check_requests(server, profile, 4 * sum(sizes[name] for name in expected))


def check_rows(one: BenchmarkResults, profile: str) -> None:
    """Verdict, missing answer, tokens and truncation of every single reply."""
    for index, key in enumerate(one.problems):
        for seed in range(4):
            name = style(f"{one.benchmark} {key.rpartition('-')[2]}?", seed)
            assert one.correct_P_K[index, seed] == (name in RIGHT[profile]), name
            assert one.no_answer_P_K[index, seed] == (name in NO_ANSWER[profile]), name
            assert one.tokens_P_K[index, seed] == TOKENS[name]
            assert one.truncated_P_K[index, seed] == (name in ("truncated", "unclosed"))


def check_requests(stub: Stub, profile: str, asked: int) -> None:
    """Each problem was asked once a seed, with the paper's sampling and the profile's prompt."""
    assert len(stub.asked) == asked and set(stub.asked.values()) == {1}
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


CHOICES = (
    "<think>A or <answer>A</answer></think><answer>B</answer>",  # right
    "<answer>The answer is (B).</answer>",  # right: the letter in it
    r"\boxed{B}",  # no answer: not in the tags
    "Answer: B",  # right: NeMo-Skills falls back on such a line
    "<answer>C</answer>",  # wrong
    "",  # no answer
)


def test_multiple_choice(skills: SkillsEnvironment, tmp_path: Path) -> None:
    gpqa = BENCHMARKS["gpqa"]
    assert gpqa.rows == 198 == 33 * len(CHOICES)
    rows = [
        {"problem": f"problem {i}?", "expected_answer": "B", "A": "x", "B": "y", "C": "z"}
        for i in range(gpqa.rows)
    ]
    write_benchmark(tmp_path / "data", "gpqa", checked_rows(gpqa, rows, "made"))
    stub = Stub(lambda problem, seed: Reply(CHOICES[int(problem.split()[1][:-1]) % len(CHOICES)]))
    out = tmp_path / "out"
    with stub as server:
        ended = evaluate(
            *("--address", server.address, "--data-dir", str(tmp_path / "data")),
            *("--benchmarks", "gpqa:1", "--out", str(out)),
            env=skills.bin.parent,
            timeout=1700,
        )
    assert ended.code == 0, ended.err
    one = read_results(out).benchmarks["gpqa"]
    assert one.metrics["pass@1"]["symbolic_correct"] == pytest.approx(50)
    assert one.metrics["pass@1"]["no_answer"] == pytest.approx(100 / 3)
    verdicts = one.correct_P_K[:, 0].reshape(33, len(CHOICES))
    assert (verdicts == [True, True, False, True, False, False]).all()
    assert len(stub.answered) == 198 and set(stub.answered.values()) == {1}

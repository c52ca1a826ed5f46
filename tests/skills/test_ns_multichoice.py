"""Multiple choice through the real `ns eval`: the letter between the tags, judged at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
from answer_stub import Reply, Stub, stub_server
from skills_runs import evaluate

from igrpo_nemo.evaluation.results import read_results
from igrpo_nemo.evaluation.skills.data import BENCHMARKS, checked_rows, write_benchmark
from igrpo_nemo.evaluation.skills.program import SkillsEnvironment

pytestmark = pytest.mark.timeout(1800)

REPLIES = (
    "<think>A or <answer>A</answer></think><answer>B</answer>",  # right
    "<answer>The answer is (B).</answer>",  # right: the letter in it
    r"\boxed{B}",  # no answer: not in the tags
    "Answer: B",  # right: NeMo-Skills falls back on such a line
    "<answer>C</answer>",  # wrong
    "",  # no answer
)


def test_gpqa(skills: SkillsEnvironment, tmp_path: Path) -> None:
    gpqa = BENCHMARKS["gpqa"]
    assert gpqa.rows == 198 == 33 * len(REPLIES)
    rows = [
        {"problem": f"problem {i}?", "expected_answer": "B", "A": "x", "B": "y", "C": "z"}
        for i in range(gpqa.rows)
    ]
    write_benchmark(tmp_path / "data", "gpqa", checked_rows(gpqa, rows, "made"))
    stub = Stub(lambda problem, seed: Reply(REPLIES[int(problem.split()[1][:-1]) % len(REPLIES)]))
    out = tmp_path / "out"
    with stub_server(stub) as server:
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
    verdicts = one.correct_P_K[:, 0].reshape(33, len(REPLIES))
    assert (verdicts == [True, True, False, True, False, False]).all()
    assert len(stub.answered) == 198 and set(stub.answered.values()) == {1}

"""Sample statistics against hand-computed values and NeMo-Skills' own classes."""

import importlib.util
import json
import os
import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation import (
    SampleResult,
    bench_metrics,
    headline,
    majority_score,
    read_samples,
    result_files,
    std_err_across_problems,
    write_metrics,
)


def sample(correct, answer="4", tokens=10, started=None, ended=None):
    return SampleResult(bool(correct), answer, tokens, started, ended)


TWO_PROBLEMS = [
    [sample(1, "4", 10, 100.0, 101.5), sample(0, "5", 20), sample(0, None, 31), sample(1, "4", 10)],
    [sample(0, "7", 10), sample(0, "7", 10), sample(1, "9", 10), sample(0, None, 10, 103.0, 107.9)],
]


def test_hand_computed_metrics_of_two_problems():
    metrics = bench_metrics(TWO_PROBLEMS)
    assert metrics["pass@1"]["symbolic_correct"] == pytest.approx(100 * (0.5 + 0.25) / 2)
    # 1 - C(2,2)/C(4,2) = 5/6 and 1 - C(3,2)/C(4,2) = 1/2
    assert metrics["pass@2"]["symbolic_correct"] == pytest.approx(100 * (5 / 6 + 1 / 2) / 2)
    assert metrics["pass@4"]["symbolic_correct"] == pytest.approx(100.0)
    assert metrics["pass@1[avg-of-2]"]["symbolic_correct"] == pytest.approx(25.0)
    assert metrics["pass@1[avg-of-4]"]["symbolic_correct"] == pytest.approx(37.5)
    assert metrics["pass@1[avg-of-4]"]["no_answer"] == pytest.approx(25.0)
    assert metrics["pass@1"]["no_answer"] == 0.0
    # first two samples: a 1-1 tie of right and wrong, then wrong twice
    assert metrics["majority@2"]["symbolic_correct"] == pytest.approx(100 * (0.5 + 0) / 2)
    assert metrics["majority@4"]["symbolic_correct"] == pytest.approx(100 * (1 + 0) / 2)
    assert metrics["pass@4"]["num_entries"] == 2
    assert metrics["pass@4"]["avg_tokens"] == 13  # 13.875, cut as NeMo-Skills does
    assert metrics["pass@4"]["gen_seconds"] == 7  # 107.9 - 100.0
    statistics = metrics["pass@1[avg-of-4]"]["symbolic_correct_statistics"]
    runs = [0.5, 0.0, 0.5, 0.5]
    assert statistics["std_dev_across_runs"] == pytest.approx(np.std(runs, ddof=1))
    assert statistics["std_err_across_runs"] == pytest.approx(np.std(runs, ddof=1) / 2)
    assert statistics["std_err_across_problems"] == pytest.approx(0.125)


def test_modes_are_exactly_nemo_skills_modes():
    modes = set(bench_metrics(TWO_PROBLEMS))
    assert modes == {
        *(f"pass@{k}" for k in (1, 2, 3, 4)),
        *(f"pass@1[avg-of-{k}]" for k in (2, 3, 4)),
        *(f"majority@{k}" for k in (2, 3, 4)),
    }
    assert set(bench_metrics([[sample(1)], [sample(0)]])) == {"pass@1"}


def test_majority_without_answers_and_with_ties():
    assert majority_score([sample(0, None), sample(0, None)]) == 0.0
    assert majority_score([sample(0, None), sample(1, "3")]) == 1.0
    assert majority_score([sample(0, "1"), sample(1, "2"), sample(0, "3")]) == pytest.approx(1 / 3)


def test_standard_error_matches_the_spread_of_repeated_benchmarks():
    rng = np.random.default_rng(0)
    p = rng.beta(1, 1, size=(2000, 50))
    draws = rng.random((2000, 50, 4)) < p[..., None]
    means = draws.mean(axis=(1, 2))
    predicted = np.mean([std_err_across_problems(d.astype(float)) for d in draws])
    assert predicted == pytest.approx(means.std(ddof=1), rel=0.05)


def test_unequal_or_missing_samples_are_named():
    with pytest.raises(UserError, match="same number of samples"):
        bench_metrics([[sample(1)], [sample(1), sample(0)]])
    with pytest.raises(UserError, match="at least one problem"):
        bench_metrics([])


def test_files_are_read_in_nemo_skills_order(tmp_path):
    for i in (0, 1, 2, 10):
        row = {
            "symbolic_correct": i == 10,
            "predicted_answer": "a\u2028b",
            "num_generated_tokens": i,
        }
        (tmp_path / f"output-rs{i}.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    (tmp_path / "output-rs0.jsonl.done").touch()
    files = result_files(tmp_path)
    assert [f.name[7:-6] for f in files] == ["rs0", "rs1", "rs10", "rs2"]
    (row,) = read_samples(files)
    assert [s.tokens for s in row] == [0, 1, 10, 2]
    assert row[0].predicted_answer == "a\u2028b"


def test_a_torn_result_file_is_named(tmp_path):
    good = json.dumps({"symbolic_correct": True, "predicted_answer": "1"}) + "\n"
    (tmp_path / "output-rs0.jsonl").write_text(good + good)
    (tmp_path / "output-rs1.jsonl").write_text(good)
    with pytest.raises(UserError, match=r"output-rs1\.jsonl has 1 rows"):
        read_samples(result_files(tmp_path))
    (tmp_path / "output-rs1.jsonl").write_text(good + good[:20])
    with pytest.raises(UserError, match=r"output-rs1\.jsonl:2"):
        read_samples(result_files(tmp_path))


def test_metrics_of_other_benchmarks_stay(tmp_path):
    path = tmp_path / "metrics.json"
    write_metrics(path, {"aime24": bench_metrics(TWO_PROBLEMS)})
    write_metrics(path, {"math-500": bench_metrics([[sample(1)]])})
    assert set(json.loads(path.read_text())) == {"aime24", "math-500"}


def test_headline_is_what_nemo_skills_prints():
    assert [row[0] for row in headline(bench_metrics(TWO_PROBLEMS))] == [
        "pass@1[avg-of-4]",
        "majority@4",
        "pass@4",
    ]
    assert headline(bench_metrics([[sample(1)], [sample(0)]])) == [("pass@1", 50.0, 50.0, 0.0)]


@pytest.fixture
def math_metrics(monkeypatch):
    """NeMo-Skills' MathMetrics, imported by path: its package would pull in the whole pipeline."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    installed = importlib.util.find_spec("nemo_skills")
    roots = list((installed and installed.submodule_search_locations) or [])
    roots.append(str(cache / "igrpo-nemo" / "nemo-skills" / "nemo_skills"))
    root = next((Path(r) for r in roots if (Path(r) / "evaluation/metrics/base.py").exists()), None)
    if root is None:
        pytest.skip(
            "NeMo-Skills' source is not on this machine: hand-computed values alone are checked"
        )
    logger_name = types.ModuleType("nemo_skills.utils")
    logger_name.get_logger_name = lambda file: file
    monkeypatch.setitem(sys.modules, "nemo_skills", types.ModuleType("nemo_skills"))
    monkeypatch.setitem(sys.modules, "nemo_skills.utils", logger_name)
    for name in ("nemo_skills.evaluation", "nemo_skills.evaluation.metrics"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name in ("base", "utils", "math_metrics"):
        full = f"nemo_skills.evaluation.metrics.{name}"
        spec = importlib.util.spec_from_file_location(full, root / f"evaluation/metrics/{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, full, module)
        spec.loader.exec_module(module)
    return sys.modules["nemo_skills.evaluation.metrics.math_metrics"].MathMetrics


@pytest.mark.parametrize("P, K", [(1, 1), (3, 1), (1, 4), (7, 3), (20, 12)])
def test_equal_to_nemo_skills_own_classes(math_metrics, P, K):
    rng = random.Random(P * 100 + K)
    samples = [
        [
            SampleResult(
                correct=(answer := rng.choice(["1", "2", "3", None])) == "2",
                predicted_answer=answer,
                tokens=rng.randrange(1, 4000),
                started=(start := 1e9 + rng.random() * 50),
                ended=start + rng.random() * 9,
            )
            for _ in range(K)
        ]
        for _ in range(P)
    ]
    theirs = math_metrics()
    for row in samples:
        theirs.update(
            [
                {
                    "symbolic_correct": s.correct,
                    "predicted_answer": s.predicted_answer,
                    "num_generated_tokens": s.tokens,
                    "generation_start_time": s.started,
                    "generation_end_time": s.ended,
                }
                for s in row
            ]
        )
    expected = theirs.get_metrics()
    expected.pop("pass@1[avg-of-1]", None)
    ours = bench_metrics(samples)
    for mode in ours.values():  # the one number that is ours
        statistics = mode.get("symbolic_correct_statistics", {})
        statistics.pop("std_err_across_problems", None)
        if not statistics:
            mode.pop("symbolic_correct_statistics", None)
    assert set(ours) == set(expected)
    for mode, fields in expected.items():
        assert list(ours[mode]) == list(fields), mode
        for key, value in fields.items():
            assert ours[mode][key] == pytest.approx(value, abs=1e-9), (mode, key)
            assert isinstance(ours[mode][key], type(value)), (mode, key)

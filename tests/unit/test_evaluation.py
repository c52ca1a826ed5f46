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
from igrpo_nemo.evaluation.metrics import (
    SampleResult,
    bench_metrics,
    format_table,
    majority_score,
)
from igrpo_nemo.evaluation.refine import Refinement, chosen_draft
from igrpo_nemo.evaluation.results import finished_files, read_samples
from igrpo_nemo.run.identity import weights_fingerprint
from igrpo_nemo.types import Completion, Problem, Prompt, StopReason


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
        (tmp_path / f"output-rs{i}.jsonl.done").touch()
    (tmp_path / "output-rs3.jsonl").write_text("not finished")
    files = finished_files(tmp_path)
    assert [f.name[7:-6] for f in files] == ["rs0", "rs1", "rs10", "rs2"]
    (row,) = read_samples(files)
    assert [s.tokens for s in row] == [0, 1, 10, 2]
    assert row[0].predicted_answer == "a\u2028b"


def test_a_torn_result_file_is_named(tmp_path):
    good = json.dumps({"symbolic_correct": True, "predicted_answer": "1"}) + "\n"
    (tmp_path / "output-rs0.jsonl").write_text(good + good)
    (tmp_path / "output-rs1.jsonl").write_text(good)
    for i in (0, 1):
        (tmp_path / f"output-rs{i}.jsonl.done").touch()
    with pytest.raises(UserError, match=r"output-rs1\.jsonl has 1 rows"):
        read_samples(finished_files(tmp_path))
    (tmp_path / "output-rs1.jsonl").write_text(good + good[:20])
    with pytest.raises(UserError, match=r"output-rs1\.jsonl:2"):
        read_samples(finished_files(tmp_path))


def test_the_table_is_what_nemo_skills_prints():
    rows = format_table("toy", bench_metrics(TWO_PROBLEMS)).splitlines()[2:]
    assert [row.split()[0] for row in rows] == ["pass@1[avg-of-4]", "majority@4", "pass@4"]
    single = bench_metrics([[sample(1, tokens=0)], [sample(0, tokens=0)]])
    (row,) = format_table("toy", single).splitlines()[2:]
    assert row.split() == "pass@1 | 2 | | 50.00% ± 50.00 | 0.00%".split()


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


class CountingSampler:
    """Answers by a coin that the seed key names; counts what it was asked."""

    def __init__(self):
        self.keys, self.prompts = [], []

    def sample(self, requests, params, on_progress=None):
        groups = []
        for request in requests:
            self.keys.append(request.seed_key)
            self.prompts.append(request.prompt_ids)
            rng = random.Random(f"{request.seed_key}/{params.temperature}")
            texts = [f"<answer>{rng.choice('46')}</answer>" for _ in range(request.num_samples)]
            groups.append([Completion(t, (1, 2), (-0.1, -0.2), StopReason.EOS) for t in texts])
            on_progress(len(groups), len(requests))
        return groups


class PlainPrompts:
    def question(self, problem):
        return Prompt(problem.question, tuple(problem.question.encode()))

    def refinement(self, problem, draft):
        text = f"{problem.question} {draft}"
        return Prompt(text, tuple(text.encode()))


PROBLEMS = [Problem(f"p{i}", f"{i}+4=", "4") for i in range(5)]


def make_answerer(sampler):
    from igrpo_nemo.local.answers import Answerer
    from igrpo_nemo.local.sampler import SamplingParams
    from igrpo_nemo.rewards import build_scorer

    return Answerer(sampler, PlainPrompts(), build_scorer(), SamplingParams(max_new_tokens=8))


def run_evaluation(out, sampler, **options):
    return run_whole(out, sampler, **options).metrics


def run_whole(
    out, sampler, *, problems=PROBLEMS, identity=None, progress=None, refinement=None, **settings
):
    from igrpo_nemo.evaluation.embedded import EvaluationSettings, evaluate_with

    options = {"num_samples": 3, "batch_size": 4, **settings}
    return evaluate_with(
        make_answerer(sampler),
        problems,
        out / "eval-results" / "toy",
        EvaluationSettings(**options),
        identity=identity,
        on_progress=progress or (lambda done, total: None),
        refinement=refinement,
    )


def test_evaluation_writes_what_nemo_skills_reads(tmp_path):
    seen = []
    metrics = run_evaluation(tmp_path, CountingSampler(), progress=lambda *p: seen.append(p))
    folder = tmp_path / "eval-results" / "toy"
    assert {p.name for p in folder.iterdir() if "output" in p.name} == {
        f"output-rs{i}.jsonl{done}" for i in range(3) for done in ("", ".done")
    }
    rows = [json.loads(line) for line in (folder / "output-rs1.jsonl").read_text().splitlines()]
    assert [row["problem"] for row in rows] == [p.question for p in PROBLEMS]
    assert {"expected_answer", "generation", "predicted_answer", "symbolic_correct"} <= set(rows[0])
    assert all(row["symbolic_correct"] == (row["predicted_answer"] == "4") for row in rows)
    assert json.loads((folder / "metrics.json").read_text()) == {"toy": metrics}
    correct = [s.correct for row in read_samples(finished_files(folder)) for s in row]
    share = metrics["pass@1[avg-of-3]"]["symbolic_correct"]
    assert share == pytest.approx(100 * sum(correct) / 15) and 0 < share < 100
    assert seen[-1] == (15, 15) and [done for done, _ in seen] == list(range(1, 16))
    assert "pass@1[avg-of-3] | 5 " in format_table("toy", metrics)


def test_an_interrupted_evaluation_goes_on_and_ends_equal(tmp_path):
    whole = run_evaluation(tmp_path / "whole", CountingSampler())
    folder = tmp_path / "parts" / "eval-results" / "toy"
    run_evaluation(tmp_path / "parts", CountingSampler())
    (folder / "output-rs1.jsonl.done").unlink()
    sampler, seen = CountingSampler(), []
    again = run_evaluation(
        tmp_path / "parts", sampler, batch_size=100, progress=lambda *p: seen.append(p)
    )
    assert sampler.keys == [f"0/evaluation/rs1/{p.id}" for p in PROBLEMS]
    assert seen == [(10 + i, 15) for i in range(1, 6)]
    for metrics in (whole, again):
        for fields in metrics.values():
            fields.pop("gen_seconds", None)
    assert again == whole


def test_samples_of_different_settings_are_never_mixed(tmp_path):
    def again(model="aaaa", **changed):
        run_evaluation(tmp_path, CountingSampler(), identity={"model": model}, **changed)

    again()
    again(num_samples=4)
    with pytest.raises(UserError, match="temperature was 0.6, is 0.7"):
        again(temperature=0.7)
    with pytest.raises(UserError, match=r'model was "aaaa", is "bbbb"'):
        again("bbbb")
    with pytest.raises(UserError, match="another evaluation"):
        again(problems=PROBLEMS[:4])
    foreign = tmp_path / "ns" / "eval-results" / "toy"
    foreign.mkdir(parents=True)
    (foreign / "output-rs0.jsonl").touch()
    (foreign / "output-rs0.jsonl.done").touch()
    with pytest.raises(UserError, match="another program"):
        run_evaluation(tmp_path / "ns", CountingSampler())


def test_evaluation_input_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(UserError, match="num_samples is 0"):
        run_evaluation(tmp_path, CountingSampler(), num_samples=0)
    with pytest.raises(UserError, match="toy has no problems"):
        run_evaluation(tmp_path, CountingSampler(), problems=[])
    (tmp_path / "eval-results").touch()
    with pytest.raises(UserError, match="cannot write the evaluation to"):
        run_evaluation(tmp_path, CountingSampler())


def test_the_draft_that_is_shown():
    def row(answer, correct=False, finish="stop", **more):
        return {
            "predicted_answer": answer,
            "symbolic_correct": correct,
            "finish_reason": finish,
            **more,
        }

    drafts = [row("5"), row(None), row("4", True, "length"), row("4", True), row("5")]
    assert chosen_draft(drafts, "reward") == 3  # the finished one of equals
    assert chosen_draft(drafts[:2], "reward") == 0
    assert chosen_draft(drafts, "majority") == 0  # of tied answers the one that was first
    assert chosen_draft([row(None), row(None), row("7")], "majority") == 2
    shaped = [row("4", True, reward=0.5), row("5", reward=0.7)]
    assert chosen_draft(shaped, "reward") == 1


def test_refined_answers_stand_beside_bare_ones(tmp_path):
    sampler = CountingSampler()
    found = run_whole(tmp_path, sampler, refinement=Refinement(2, "reward"))
    bare = tmp_path / "eval-results" / "toy"
    refined = tmp_path / "refined" / "eval-results" / "toy"
    assert found.file == bare / "metrics.json" and found.refined.file == refined / "metrics.json"
    assert sampler.keys[15:] == [f"0/refined/rs{i}/{p.id}" for i in range(3) for p in PROBLEMS]
    columns = [
        [json.loads(line) for line in (bare / f"output-rs{i}.jsonl").read_text().splitlines()]
        for i in range(2)
    ]
    for problem, prompt, *drafts in zip(PROBLEMS, sampler.prompts[15:20], *columns, strict=True):
        best = max(drafts, key=lambda row: row["symbolic_correct"])
        assert bytes(prompt).decode() == f"{problem.question} {best['generation']}"
    asked = json.loads((refined / "evaluation.json").read_text())
    assert (asked["refine"], asked["choose"]) == (2, "reward")
    for metrics in (found.metrics, found.refined.metrics):
        assert {"pass@3", "majority@3", "pass@1[avg-of-3]"} <= set(metrics)
    assert " toy, refined " in str(found) and str(found).count("majority@3") == 2
    again = run_whole(tmp_path, sampler, refinement=Refinement(2, "reward"))
    assert again == found and len(sampler.keys) == 30
    with pytest.raises(UserError, match='choose was "reward", is "majority"'):
        run_whole(tmp_path, sampler, refinement=Refinement(2, "majority"))
    with pytest.raises(UserError, match="--refine 4 chooses .* toy has 3 a problem"):
        Refinement(4).check(3, "toy")


def test_single_shot_groups_answer_each_problem():
    answerer = make_answerer(sampler := CountingSampler())
    groups = answerer([(p, f"7/validation/{p.id}") for p in PROBLEMS], 2)
    assert [g.problem for g in groups] == PROBLEMS
    assert all(len(g.completions) == len(g.scores) == 2 for g in groups)
    for group in groups:
        for completion, score in zip(group.completions, group.scores, strict=True):
            assert score.correct == ("4" in completion.text)
    assert sampler.keys == [f"7/validation/{p.id}" for p in PROBLEMS]


def test_weights_that_were_trained_are_told_apart(tmp_path):
    blob = random.Random(0).randbytes(300_000)
    for name, data in (("a", blob), ("b", blob), ("c", blob[:-1] + b"x")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(data)
    a, b, c = (weights_fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c
    assert weights_fingerprint(Path("org/model")) == "org/model"

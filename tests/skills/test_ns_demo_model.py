"""A small trained model through the real `ns eval`: its verdicts are `igrpo evaluate`'s."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from skills_runs import evaluate

from igrpo_nemo.chain.evaluation import write_arithmetic
from igrpo_nemo.config import Config, read_config
from igrpo_nemo.evaluation.metrics import SampleResult, bench_metrics
from igrpo_nemo.evaluation.results import read_results
from igrpo_nemo.evaluation.skills.program import SkillsEnvironment
from igrpo_nemo.rewards import ScoreRequest
from igrpo_nemo.rewards.accuracy import Verdict, find_answer
from igrpo_nemo.run.core import evaluation_scorer
from igrpo_nemo.types import Problem

pytestmark = pytest.mark.timeout(1800)

PROBLEMS, SAMPLES = 150, 2
RUN = (
    "experiment=demo",
    "data.train.lengths=[3]",
    "igrpo.warmup.steps=150",
    "igrpo.warmup.batch_size=24",
    "igrpo.threads=1",
    "grpo.num_prompts_per_step=4",
    "grpo.max_num_steps=2",
    "grpo.val_period=0",
    "grpo.val_at_start=false",
    "grpo.val_at_end=false",
    "checkpointing.metric_name=null",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, after a warm-up that makes some answers right."""
    folder = tmp_path_factory.mktemp("demo")
    environ = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "igrpo_nemo", "train", *RUN, f"logger.log_dir={folder}/run"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def sample_rows(out: Path, seed: int) -> list[dict]:
    path = out / "eval-results" / "arithmetic" / f"output-rs{seed}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def our_results(config: Config, rows: list[dict]) -> list[SampleResult]:
    """The rows' replies as `igrpo evaluate` scores them, their thinking put back."""
    asked = []
    for row in rows:
        thinking = row.get("reasoning_content")
        text = (
            row["generation"]
            if thinking is None
            else f"<think>{thinking}</think>{row['generation']}"
        )
        problem = Problem(id=row["id"], question=row["problem"], answer=row["expected_answer"])
        asked.append(ScoreRequest(problem, text, False, row["finish_reason"] == "length"))
    with closing(evaluation_scorer(config)) as scorer:
        scores = scorer(asked)
    results = []
    for one, score, row in zip(asked, scores, rows, strict=True):
        found = find_answer(one.problem.answer, one.text, truncated=one.truncated)
        answer = found.answer if isinstance(found, Verdict) else found
        results.append(SampleResult(bool(score.correct), answer, row["num_generated_tokens"]))
    return results


def test_nemo_skills_and_igrpo_evaluate_agree(
    run: Path, skills: SkillsEnvironment, tmp_path: Path
) -> None:
    config = read_config(run / "config.yaml")
    write_arithmetic(config, tmp_path / "data", PROBLEMS)
    (checkpoint,) = (run / "checkpoints").glob("step_*2")
    out = tmp_path / "out"
    ended = evaluate(
        *("--model", str(checkpoint), "--serve", "--data-dir", str(tmp_path / "data")),
        *("--benchmarks", f"arithmetic:{SAMPLES}", "--out", str(out)),
        *("igrpo.evaluation.temperature=1.0", "igrpo.evaluation.top_p=1.0"),
        env=skills.bin.parent,
        timeout=1700,
    )
    assert ended.code == 0, ended.err
    theirs = read_results(out).benchmarks["arithmetic"]
    assert theirs.correct_P_K.shape == (PROBLEMS, SAMPLES)
    ours_K_P = [our_results(config, sample_rows(out, seed)) for seed in range(SAMPLES)]
    for seed, ours in enumerate(ours_K_P):
        for result, row in zip(ours, sample_rows(out, seed), strict=True):
            assert result.correct == row["symbolic_correct"], row
            assert result.predicted_answer == row["predicted_answer"], row
    metrics = bench_metrics([list(samples) for samples in zip(*ours_K_P, strict=True)])
    for mode in (f"pass@1[avg-of-{SAMPLES}]", f"pass@{SAMPLES}", f"majority@{SAMPLES}"):
        for name in ("symbolic_correct", "no_answer", "num_entries", "avg_tokens"):
            assert metrics[mode][name] == pytest.approx(theirs.metrics[mode][name]), (mode, name)
    # A test of agreement needs right and wrong answers, and some that are missing.
    assert theirs.correct_P_K.any() and theirs.no_answer_P_K.any()
    assert (~theirs.correct_P_K & ~theirs.no_answer_P_K).any()
    # Samples of one problem differ, so the server heeds the seed.
    texts = [[row["generation"] for row in sample_rows(out, seed)] for seed in range(SAMPLES)]
    assert texts[0] != texts[1]

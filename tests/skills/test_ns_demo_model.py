"""A small trained model through the real `ns eval`: its verdicts are `igrpo evaluate`'s."""

from __future__ import annotations

import json
import re
from contextlib import closing
from pathlib import Path

import pytest
from skills_runs import pipeline

from igrpo_nemo.config import Config, read_config
from igrpo_nemo.evaluation.metrics import SampleResult, bench_metrics
from igrpo_nemo.evaluation.refine import whole_reply
from igrpo_nemo.evaluation.results import read_results
from igrpo_nemo.evaluation.skills.program import SkillsEnvironment
from igrpo_nemo.rewards import ScoreRequest
from igrpo_nemo.rewards.accuracy import Verdict, find_answer
from igrpo_nemo.run.core import evaluation_scorer
from igrpo_nemo.types import Problem

pytestmark = pytest.mark.timeout(600)

PROBLEMS, SAMPLES = 100, 2
WORDS = (
    "experiment=demo", "data.train.lengths=[3]", "igrpo.warmup.steps=250",
    "igrpo.warmup.batch_size=24", "igrpo.threads=1", "grpo.num_prompts_per_step=4",
    "grpo.max_num_steps=2", f"grpo.max_val_samples={PROBLEMS}", "grpo.val_period=0",
    "grpo.val_at_start=false", "grpo.val_at_end=false", "checkpointing.metric_name=null",
    "igrpo.evaluation.temperature=1.0", "igrpo.evaluation.top_p=1.0",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, skills: SkillsEnvironment) -> Path:
    """A chain on this machine: a warm-up that makes some answers right, and two steps."""
    folder = tmp_path_factory.mktemp("demo")
    words = ("--samples", str(SAMPLES), *WORDS, f"logger.log_dir={folder / 'run'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("PYTHONPATH", raising=False)
        ended = pipeline("train_and_evaluate.py", *words, env=skills.bin.parent)
    assert ended.code == 0, f"{ended.out[-3000:]}\n{ended.err[-3000:]}"
    assert "pass@1[avg-of-2] | 100 " in ended.out
    return folder / "run"


@pytest.fixture(scope="module")
def out(run: Path) -> Path:
    (setting,) = (run / "evaluation" / "last").glob("*/setting.json")
    return setting.parent


def sample_rows(out: Path, seed: int) -> list[dict]:
    path = out / "eval-results" / "arithmetic" / f"output-rs{seed}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def our_results(config: Config, rows: list[dict]) -> list[SampleResult]:
    """The rows' replies as `igrpo evaluate` scores them, their thinking put back."""
    asked = []
    for row in rows:
        text = whole_reply(row)
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


def test_a_chain_on_this_machine_evaluates_with_nemo_skills(
    run: Path, out: Path, skills: SkillsEnvironment
) -> None:
    results = read_results(out)
    assert results.setting["nemo_skills"] == skills.version
    correct_P_K = results.benchmarks["arithmetic"].correct_P_K
    assert correct_P_K.shape == (PROBLEMS, SAMPLES)
    page = (run / "comparison" / "comparison.md").read_text()
    accuracy = f"{100 * correct_P_K.mean():.1f}"
    assert re.search(rf"\| demo +\| +{accuracy} ±", page) and "All: evaluator NeMo-Skills" in page


def test_nemo_skills_and_igrpo_evaluate_agree(run: Path, out: Path) -> None:
    config = read_config(run / "config.yaml")
    theirs = read_results(out).benchmarks["arithmetic"]
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

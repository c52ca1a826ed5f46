"""Sample files as NeMo-Skills writes them, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from igrpo_nemo.evaluation import results
from igrpo_nemo.evaluation.metrics import bench_metrics

PROBLEMS = ("one?", "two?", "three?")


def row(problem: str, correct: bool = True, answer: str | None = "4") -> dict[str, Any]:
    return {
        "problem": problem,
        "expected_answer": "4",
        "generation": f"<answer>{answer}</answer>",
        "predicted_answer": answer,
        "symbolic_correct": correct,
        "num_generated_tokens": 7,
        "finish_reason": "stop",
    }


def write_sample(where: Path, seed: int, rows: list[dict[str, Any]], *, done: bool = True) -> None:
    where.mkdir(parents=True, exist_ok=True)
    results.write_rows(where, seed, rows)
    if not done:
        results.done_path(where, seed).unlink()


def write_unordered(where: Path, seed: int, rows: dict[int, dict[str, Any]]) -> Path:
    where.mkdir(parents=True, exist_ok=True)
    path = where / f"output-rs{seed}.jsonl-async"
    lines = [json.dumps({**one, "_async_position": at}) + "\n" for at, one in rows.items()]
    path.write_text("".join(lines))
    return path


def write_metrics(where: Path) -> None:
    """metrics.json of what is there, as `summarize_results` makes it."""
    samples = results.read_samples(sorted(where.glob("output-rs*.jsonl")))
    results.write_metrics(where, bench_metrics(samples))


def whole_benchmark(out: Path, name: str = "toy", samples: int = 2) -> Path:
    """`samples` samples of PROBLEMS: the first problem is always right, the last one never."""
    where = out / "eval-results" / name
    for seed in range(samples):
        rights = (True, seed == 0, False)
        rows = [row(p, right) for p, right in zip(PROBLEMS, rights, strict=True)]
        write_sample(where, seed, rows)
    write_metrics(where)
    return where

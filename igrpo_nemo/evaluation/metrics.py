"""Statistics of k samples a problem, under the names and nesting of NeMo-Skills' `metrics.json`.

    samples_P_K --bench_metrics--> metrics --format_table--> what NeMo-Skills prints

    {"<bench>": {"pass@1": {...}, "pass@k": {...}, "pass@1[avg-of-k]": {...}, "majority@k": {...}}}

Scores and `no_answer` are percentages, `*_statistics` fractions, as in NeMo-Skills 0.7. One number
is ours: `std_err_across_problems`, the standard error of pass@1[avg-of-k] over problems.
Dimensions: P problems, K samples a problem.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.statistics import estimate
from igrpo_nemo.files.display_text import columns
from igrpo_nemo.metrics import pass_at_k


@dataclass(frozen=True, slots=True)
class SampleResult:
    """One scored sample: what NeMo-Skills' math metrics read from a row of `output-rs{i}.jsonl`.

    `tokens` is 0 where the server did not count them. `started` and `ended` are unix seconds of the
    generation, None where unknown. `truncated`: cut at its token limit.
    """

    correct: bool
    predicted_answer: str | None
    tokens: int
    started: float | None = None
    ended: float | None = None
    truncated: bool = False


def bench_metrics(samples_P_K: Sequence[Sequence[SampleResult]]) -> dict[str, dict[str, Any]]:
    """NeMo-Skills' metrics of one benchmark, for every k up to K.

    Order matters for k < K: `pass@1[avg-of-k]` and `majority@k` read the *first* k samples of each
    problem. `pass@k` is the unbiased estimate over all K samples (arXiv 2107.03374, Eq. 1), so
    `pass@1` equals `pass@1[avg-of-K]` in `symbolic_correct`; its `no_answer` is sample 0's alone.
    Raises `UserError` when there are no problems or the numbers of samples differ.
    """
    sizes = sorted({len(row) for row in samples_P_K})
    if not sizes or sizes[0] == 0:
        raise UserError(
            "no samples to compute metrics from: give at least one problem and one sample"
        )
    if len(sizes) > 1:
        raise UserError(f"every problem needs the same number of samples, found {sizes}")
    (K,) = sizes
    correct_P_K = np.array([[float(s.correct) for s in row] for row in samples_P_K])
    missing_P_K = np.array([[s.predicted_answer is None for s in row] for row in samples_P_K])
    tokens_P_K = np.array([[float(s.tokens) for s in row] for row in samples_P_K])
    common = _common_fields(samples_P_K, tokens_P_K)
    metrics: dict[str, dict[str, Any]] = {}
    for k in range(1, K + 1):
        correct_P_k, missing_P_k = correct_P_K[:, :k], missing_P_K[:, :k]
        without = {"no_answer": _percent(np.all(missing_P_k, axis=1))}
        passes_P = [pass_at_k(K, int(c), k) for c in correct_P_K.sum(axis=1)]
        metrics[f"pass@{k}"] = {**common, "symbolic_correct": _percent(passes_P), **without}
        if k == 1:  # NeMo-Skills drops pass@1[avg-of-1]
            continue
        metrics[f"pass@1[avg-of-{k}]"] = {
            **common,
            "symbolic_correct": _percent(correct_P_k.mean(axis=1)),
            "no_answer": _percent(missing_P_k.mean(axis=1)),
            # Without a reasoning parser NeMo-Skills counts every token as an answer token.
            "reasoning_tokens_statistics": _spread(np.zeros_like(tokens_P_K[:, :k])),
            "answer_tokens_statistics": _spread(tokens_P_K[:, :k]),
            "symbolic_correct_statistics": {**_spread(correct_P_k), **_over_problems(correct_P_k)},
        }
        votes_P = [majority_score(row[:k]) for row in samples_P_K]
        metrics[f"majority@{k}"] = {**common, "symbolic_correct": _percent(votes_P), **without}
    if K == 1:
        metrics["pass@1"]["symbolic_correct_statistics"] = _over_problems(correct_P_K)
    return metrics


def majority_score(samples: Sequence[SampleResult]) -> float:
    """Score of the most frequent answer in [0, 1]; the mean over tied ones; 0 without any answer.

    As in NeMo-Skills, an answer is its literal string and votes are counted per (answer, verdict).
    """
    votes = Counter(
        (s.predicted_answer, s.correct) for s in samples if s.predicted_answer is not None
    )
    most = max(votes.values(), default=0)
    tied = [correct for (_, correct), count in votes.items() if count == most]
    return sum(tied) / len(tied) if tied else 0.0


def _over_problems(correct_P_K: np.ndarray) -> dict[str, float]:
    """The error of pass@1[avg-of-K] over problems: the choice of problems and sampling noise, where
    the spread over runs has the same problems each time. 0 for a single problem."""
    return {"std_err_across_problems": estimate(correct_P_K).problems or 0.0}


def format_table(
    benchmark: str, metrics: Mapping[str, Mapping[str, Any]], stderr: float | None = None
) -> str:
    """The rows that NeMo-Skills prints. `stderr` is pass@1's over problems (a fraction), where the
    metrics are not ours and have none."""
    K = max(int(mode.removeprefix("pass@")) for mode in metrics if mode[5:].isdecimal())
    modes = [f"pass@1[avg-of-{K}]", f"majority@{K}", f"pass@{K}"] if K > 1 else ["pass@1"]
    rows = [["evaluation_mode", "num_entries", "avg_tokens", "symbolic_correct", "no_answer"]]
    for mode in modes:
        row = metrics[mode]
        known = row.get("symbolic_correct_statistics", {}).get("std_err_across_problems")
        if mode == modes[0] and known is None:
            known = stderr
        error = "" if known is None else f" ± {100 * known:.2f}"
        counts = [str(row["num_entries"]), str(row.get("avg_tokens", ""))]
        correct, no_answer = f"{row['symbolic_correct']:.2f}%{error}", f"{row['no_answer']:.2f}%"
        rows.append([mode, *counts, correct, no_answer])
    lines = columns(rows, " | ")
    return "\n".join([f" {benchmark} ".center(max(map(len, lines)), "-"), *lines])


def _spread(values_P_K: np.ndarray) -> dict[str, float]:
    """NeMo-Skills' statistics of a score over K >= 2 runs; run i is sample i of each problem."""
    across_runs = float(np.std(values_P_K.mean(axis=0), ddof=1))
    return {
        "avg": float(values_P_K.mean()),
        "std_dev_across_runs": across_runs,
        "avg_sample_std_dev": float(np.std(values_P_K, axis=1, ddof=1).mean()),
        "std_err_across_runs": across_runs / math.sqrt(values_P_K.shape[1]),
    }


def _common_fields(
    samples_P_K: Sequence[Sequence[SampleResult]], tokens_P_K: np.ndarray
) -> dict[str, int]:
    """`num_entries`, `avg_tokens`, `gen_seconds`: cut to whole numbers, left out if unknown."""
    fields = {"num_entries": len(samples_P_K)}
    if tokens_P_K.sum() > 0:
        fields["avg_tokens"] = int(sum(sum(row) / len(row) for row in tokens_P_K) / len(tokens_P_K))
    started = [s.started for row in samples_P_K for s in row if s.started is not None]
    ended = [s.ended for row in samples_P_K for s in row if s.ended is not None]
    if started and ended:
        fields["gen_seconds"] = int(max(ended) - min(started))
    return fields


def _percent(values_P: Sequence[float] | np.ndarray) -> float:
    values = [float(value) for value in values_P]
    return 100.0 * sum(values) / len(values)

"""Evaluation output folders in NeMo-Skills' layout, with chosen verdicts, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from igrpo_nemo.evaluation.metrics import SampleResult, bench_metrics
from igrpo_nemo.evaluation.results import write_metrics, write_rows

SETTING = {
    "profile": "answer_tags",
    "system_prompt": "Think, then answer.",
    "temperature": 0.6,
    "top_p": 0.95,
    "max_tokens": 65000,
}


def write_evaluation(
    folder: Path,
    verdicts: dict[str, np.ndarray],
    *,
    tokens: int = 100,
    data: str = "0",
    without: tuple[str, ...] = (),
    **setting: object,
) -> Path:
    """A complete evaluation: `verdicts` are bool P x K by benchmark; a wrong answer is "0".

    Every fourth wrong sample has no answer at all. `data` stands for a digest of the problems,
    `setting` replaces values of `SETTING`, and `without` leaves some out.
    """
    for name, verdicts_P_K in verdicts.items():
        where = folder / "eval-results" / name
        where.mkdir(parents=True)
        P, K = verdicts_P_K.shape
        results: list[list[SampleResult]] = [[] for _ in range(P)]
        for k in range(K):
            rows = []
            for p in range(P):
                right = bool(verdicts_P_K[p, k])
                answer = "1" if right else None if (p + k) % 4 == 0 else "0"
                results[p].append(SampleResult(right, answer, tokens + k))
                rows.append(
                    {
                        "id": f"{name}/{p}",
                        "symbolic_correct": right,
                        "predicted_answer": answer,
                        "num_generated_tokens": tokens + k,
                        "finish_reason": "length" if answer is None else "stop",
                    }
                )
            write_rows(where, k, rows)
        write_metrics(where, bench_metrics(results))
    samples = {name: verdicts_P_K.shape[1] for name, verdicts_P_K in verdicts.items()}
    problems = {
        name: {"rows": verdicts_P_K.shape[0], "sha256": data}
        for name, verdicts_P_K in verdicts.items()
    }
    values = {**SETTING, "benchmarks": samples, "problems": problems, **setting}
    kept = {name: value for name, value in values.items() if name not in without}
    (folder / "setting.json").write_text(json.dumps(kept))
    return folder


def draw(rates: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """P x K verdicts with these success rates."""
    return np.random.default_rng(seed).random((len(rates), samples)) < rates[:, None]

"""Benchmarks of a few problems, and pipelines/evaluate.py as a user calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from igrpo_nemo.evaluation.skills.data import write_benchmark

CHECKOUT = Path(__file__).resolve().parents[2]


def write_problems(folder: Path, benchmark: str, answers: list[str]) -> list[str]:
    """A benchmark of the problems "BENCHMARK problem I?", whose texts it returns."""
    texts = [f"{benchmark} problem {i}?" for i in range(len(answers))]
    rows = [
        {"id": f"{benchmark}-{i}", "problem": text, "expected_answer": answer}
        for i, (text, answer) in enumerate(zip(texts, answers, strict=True))
    ]
    write_benchmark(folder, benchmark, rows)
    return texts


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


def evaluate(*words: str, env: Path | None = None, timeout: float = 280) -> Ended:
    """Runs pipelines/evaluate.py to its end."""
    return pipeline("evaluate.py", *words, env=env, timeout=timeout)


def pipeline(script: str, *words: str, env: Path | None = None, timeout: float = 280) -> Ended:
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    environ.pop("NEMO_SKILLS_DATA_DIR", None)
    if env is not None:
        environ["NEMO_SKILLS_ENV"] = str(env)
    done = subprocess.run(
        [sys.executable, str(CHECKOUT / "pipelines" / script), *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environ,
        cwd=CHECKOUT,
    )
    return Ended(done.returncode, done.stdout, done.stderr)

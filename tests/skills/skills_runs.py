"""Benchmarks of a few problems, and pipelines/evaluate.py as a user calls it."""

from __future__ import annotations

import io
import os
import runpy
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from igrpo_nemo.chain.script import exit_code
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


def evaluate(*words: str, env: Path | None = None) -> Ended:
    """Runs pipelines/evaluate.py to its end."""
    return pipeline("evaluate.py", *words, env=env)


def pipeline(script: str, *words: str, env: Path | None = None) -> Ended:
    """A script of pipelines/ as it is started, but in this process: most of a call is imports."""
    main = runpy.run_path(str(CHECKOUT / "pipelines" / script))["main"]
    before, folder = dict(os.environ), Path.cwd()
    os.environ.pop("NEMO_SKILLS_DATA_DIR", None)
    if env is not None:
        os.environ["NEMO_SKILLS_ENV"] = str(env)
    out, err = io.StringIO(), io.StringIO()
    try:
        os.chdir(CHECKOUT)
        with redirect_stdout(out), redirect_stderr(err):
            code = exit_code(main, words)
    finally:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(before)
    return Ended(code, out.getvalue(), err.getvalue())

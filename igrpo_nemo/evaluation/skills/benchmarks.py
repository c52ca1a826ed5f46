"""The benchmarks of the paper, under NeMo-Skills' names, and what is known of their data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from igrpo_nemo.config import Config
from igrpo_nemo.config.igrpo_keys import Evaluation
from igrpo_nemo.errors import UserError

Kind = Literal["math", "multichoice"]
DEFAULT_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark. `rows` is None where its size is not known; the row count is checked else."""

    name: str
    about: str
    kind: Kind = "math"
    rows: int | None = None
    integer_answers: bool = False
    """Gold answers are written as plain integers: NeMo-Skills finds "073" different from "73"."""
    split: str = "test"
    """Name of the file that NeMo-Skills prepares for it."""


_KNOWN = (
    Benchmark("aime24", "AIME 2024 I and II", rows=30, integer_answers=True),
    Benchmark("aime25", "AIME 2025 I and II", rows=30, integer_answers=True),
    Benchmark("math-500", "500 held-out problems of MATH (arXiv 2305.20050)", rows=500),
    Benchmark("amc23", "AMC 12 2023", rows=40, integer_answers=True),
    Benchmark("gsm8k", "GSM8K test (arXiv 2110.14168)", rows=1319),
    Benchmark("minerva_math", "Minerva's OpenCourseWare problems (arXiv 2206.14858)", rows=272),
    Benchmark("gpqa", "GPQA diamond (arXiv 2311.12022)", "multichoice", 198, split="diamond"),
    Benchmark("mmlu-pro", "MMLU-Pro test (arXiv 2406.01574)", "multichoice", 12032),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _KNOWN}


def benchmark_named(name: str) -> Benchmark:
    """A known benchmark, or one of math problems whose data is the user's own."""
    return BENCHMARKS.get(name) or Benchmark(name, "problems of your own")


def with_benchmarks(config: Config, text: str | None) -> Config:
    """The config with the benchmarks of `--benchmarks aime24:64,gsm8k` alone.

    Without a number a benchmark keeps the config's, or gets eight samples.
    """
    if text is None:
        return config
    keys = config.igrpo.evaluation
    chosen: dict[str, int] = {}
    for word in text.split(","):
        name, colon, samples = word.strip().partition(":")
        if colon and not (samples.isdecimal() and int(samples) > 0):
            raise UserError(f"--benchmarks {word}: write NAME or NAME:K with K of 1 or more")
        chosen[name] = int(samples) if colon else keys.benchmarks.get(name, DEFAULT_SAMPLES)
    try:
        checked = Evaluation.model_validate({**keys.model_dump(), "benchmarks": chosen})
    except ValueError as error:
        raise UserError(f"--benchmarks {text}: no benchmark has such a name") from error
    return config.replaced("igrpo", evaluation=checked)

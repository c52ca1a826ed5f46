"""The files of an evaluation, in NeMo-Skills' layout: written, and read and checked, here alone.

    OUT/setting.json                what was asked for (`setting`); a folder made by others has none
    OUT/eval-results/<bench>/  output-rs{i}.jsonl       sample i of every problem, one a line
                               output-rs{i}.jsonl.done  it is whole: not sampled again
                               metrics.json             {bench: metrics.bench_metrics}
                               evaluation.json          what `igrpo evaluate` was asked for
        --read_results--> Results, or a `UserError` that names what is missing

What `ns` says about itself is not trusted: it exits with 0 when a job failed, and computes
metrics.json from the samples that happen to be there. Dimensions: P problems, K samples a problem.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.metrics import SampleResult, majority_score
from igrpo_nemo.evaluation.statistics import (
    Estimate,
    bayes_at_n,
    estimate,
    over_problems,
    pass_at_k_curve,
)
from igrpo_nemo.files.atomic import write_atomic

SETTING_FILE = "setting.json"
EMBEDDED_FILE = "evaluation.json"
RESULTS_FOLDER = "eval-results"
REFINED = "refined"
"""The folder of the refined answers, an evaluation's output inside that of the bare ones."""


@dataclass(frozen=True)
class BenchmarkResults:
    """One benchmark: P problems in the data's order, K samples each, where nothing is missing.

    Column j of the arrays is `output-rs{seeds[j]}.jsonl`. `metrics` is the benchmark's part of
    NeMo-Skills' metrics.json: mode ("pass@1[avg-of-64]") -> field ("symbolic_correct") -> number.
    """

    benchmark: str
    missing: tuple[str, ...] = ()
    """Sentences; empty where the benchmark is complete."""
    seeds: tuple[int, ...] = ()
    """K seeds, ascending."""
    problems: tuple[str, ...] = ()
    """P keys (`problem_key`)."""
    samples_P_K: Sequence[Sequence[SampleResult]] = ()
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        return len(self.seeds)

    @cached_property
    def correct_P_K(self) -> np.ndarray:
        """bool: the evaluator's verdict."""
        return np.array([[s.correct for s in row] for row in self.samples_P_K])

    @cached_property
    def no_answer_P_K(self) -> np.ndarray:
        return np.array([[s.predicted_answer is None for s in row] for row in self.samples_P_K])

    @cached_property
    def tokens_P_K(self) -> np.ndarray:
        """int: tokens of the reply, its thinking included; 0 where the server did not say."""
        return np.array([[s.tokens for s in row] for row in self.samples_P_K])

    @cached_property
    def truncated_P_K(self) -> np.ndarray:
        """bool: the reply was cut at its token limit."""
        return np.array([[s.truncated for s in row] for row in self.samples_P_K])

    @cached_property
    def accuracy(self) -> Estimate:
        return estimate(self.correct_P_K)

    @cached_property
    def passes(self) -> Mapping[int, Estimate]:
        """pass@k for k = 1, 2, 4, ... K."""
        return pass_at_k_curve(self.correct_P_K.sum(axis=1), self.num_samples)

    @cached_property
    def bayes(self) -> Estimate:
        return bayes_at_n(self.correct_P_K.sum(axis=1), self.num_samples)

    @cached_property
    def majority(self) -> Estimate | None:
        """The vote of all K samples; None for K = 1."""
        if self.num_samples == 1:
            return None
        return over_problems([majority_score(row) for row in self.samples_P_K])

    @cached_property
    def no_answer(self) -> Estimate:
        return estimate(self.no_answer_P_K)

    @cached_property
    def truncated(self) -> Estimate:
        return estimate(self.truncated_P_K)

    @cached_property
    def tokens(self) -> Estimate | None:
        """None where the server did not count them."""
        return estimate(self.tokens_P_K) if self.tokens_P_K.any() else None


@dataclass(frozen=True, slots=True)
class Results:
    """A whole evaluation. `setting` is setting.json, empty where the folder has none."""

    folder: Path
    setting: Mapping[str, Any]
    benchmarks: Mapping[str, BenchmarkResults]


def pooled(parts: Sequence[BenchmarkResults]) -> BenchmarkResults:
    """The problems of several benchmarks as one, each with as many samples as all of them have."""
    K = min(one.num_samples for one in parts)
    return BenchmarkResults(
        "+".join(one.benchmark for one in parts),
        seeds=tuple(range(K)),
        problems=tuple(f"{one.benchmark}/{key}" for one in parts for key in one.problems),
        samples_P_K=[row[:K] for one in parts for row in one.samples_P_K],
    )


def read_results(folder: Path, benchmarks: Sequence[str] | None = None) -> Results:
    """The results in an evaluation's output folder, with every count checked.

    With a setting.json, its benchmarks (or those named here), their samples and problems must all
    be there; without one (an `igrpo evaluate`, a plain `ns eval`), what is there must be whole.
    Raises `UserError` naming the first benchmark that lacks something, and what.
    """
    found = inspected(folder, benchmarks)
    if lacking := [one for one in found if one.missing]:
        more = f" (and {len(lacking) - 1} more benchmarks)" if len(lacking) > 1 else ""
        reasons = "; ".join(lacking[0].missing)
        raise UserError(f"{folder} is incomplete: {lacking[0].benchmark}: {reasons}{more}")
    return Results(folder, read_setting(folder), {one.benchmark: one for one in found})


def inspected(folder: Path, benchmarks: Sequence[str] | None = None) -> list[BenchmarkResults]:
    """What each benchmark of the folder (or each named one) has and lacks.

    Raises `UserError` where the folder holds no benchmark at all.
    """
    setting, where = read_setting(folder), folder / RESULTS_FOLDER
    names = list(benchmarks or setting.get("benchmarks") or ())
    names = names or sorted(path.name for path in where.glob("*/"))
    if not names:
        raise UserError(f"{where} holds no benchmark: evaluate into it first")
    return [inspect(folder, name, setting) for name in names]


def read_setting(where: Path, file: str = SETTING_FILE) -> dict[str, Any]:
    """A folder's setting.json, or the `EMBEDDED_FILE` that `igrpo evaluate` left beside a
    benchmark's samples; empty where there is none."""
    path = where / file
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no setting: evaluate into another folder")
    return values


def inspect(folder: Path, benchmark: str, setting: Mapping[str, Any]) -> BenchmarkResults:
    """What a benchmark has and lacks, by its files alone: samples, rows, `.done` files, metrics."""
    where = folder / RESULTS_FOLDER / benchmark
    asked = setting.get("benchmarks", {}).get(benchmark)
    names = [path.stem.removeprefix("output-rs") for path in where.glob("output-rs*.jsonl")]
    seeds = list(range(asked)) if asked else sorted(int(name) for name in names if name.isdecimal())
    if not seeds:
        return BenchmarkResults(benchmark, ("no samples (output-rs*.jsonl)",))
    present = [seed for seed in seeds if sample_path(where, seed).is_file()]
    done = [seed for seed in present if done_path(where, seed).is_file()]
    files = {seed: whole_file(sample_path(where, seed)) for seed in done}
    whole = {seed: file for seed, file in files.items() if file is not None}
    problems = {seed: tuple(key for key, _ in file) for seed, file in whole.items()}
    rows = setting.get("problems", {}).get(benchmark, {}).get("rows")
    rows = rows or max(map(len, problems.values()), default=0)

    missing = []
    if absent := [seed for seed in seeds if seed not in present]:
        missing.append(f"{len(absent)} of {len(seeds)} samples are missing ({_shown(absent)})")
    if unfinished := [seed for seed in present if seed not in done]:
        count = f"{len(unfinished)} of {len(seeds)} samples"
        missing.append(f"{count} are unfinished ({_shown(unfinished)})")
    if broken := [seed for seed in done if seed not in whole]:
        missing.append(f"a row is broken in {_shown(broken)}")
    first = problems[min(whole)] if whole else ()
    if short := [seed for seed, keys in problems.items() if len(keys) != rows]:
        found = len(problems[short[0]])
        missing.append(f"{_shown(short)} should have {rows} rows, rs{short[0]} has {found}")
    elif mixed := [seed for seed, keys in problems.items() if keys != first]:
        missing.append(f"{_shown(mixed)} holds other problems than rs{min(whole)}")
    if not rows:
        missing.append("its sample files are empty")
    if missing:
        return BenchmarkResults(benchmark, tuple(missing))
    columns = ([sample for _, sample in whole[seed]] for seed in seeds)
    samples_P_K = list(zip(*columns, strict=True))
    metrics = _metrics(where)
    if problem := _metrics_problem(metrics, samples_P_K):
        return BenchmarkResults(benchmark, (problem,))
    return BenchmarkResults(benchmark, (), tuple(seeds), first, samples_P_K, metrics)


def sample_path(where: Path, seed: int) -> Path:
    """NeMo-Skills' file of sample number `seed` of every problem."""
    return where / f"output-rs{seed}.jsonl"


def done_path(where: Path, seed: int) -> Path:
    """The marker that NeMo-Skills leaves beside a finished sample file."""
    return where / f"output-rs{seed}.jsonl.done"


def finished_files(where: Path) -> list[Path]:
    """The sample files of a benchmark's folder that are whole, in the order that NeMo-Skills reads
    them: by name, rs10 before rs2."""
    files = sorted(where.glob("output-rs*.jsonl"), key=lambda path: path.name)
    return [path for path in files if path.with_name(f"{path.name}.done").exists()]


def write_rows(where: Path, seed: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a sample file, and its `.done` once it is whole."""
    write_atomic(sample_path(where, seed), json_lines(rows))
    done_path(where, seed).touch()


def json_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A row a line, in ASCII escapes: text from models may hold other ends of lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode("ascii")


def write_metrics(where: Path, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    write_atomic(where / "metrics.json", json.dumps({where.name: metrics}, indent=2))


def read_samples(files: Sequence[Path]) -> list[list[SampleResult]]:
    """samples_P_K from K files with one row a problem in the same order.

    Raises `UserError` naming the file and line that is not a result, or the file that is shorter.
    """
    columns = [[sample for _, sample in parsed_file(path)] for path in files]
    for path, column in zip(files, columns, strict=True):
        if len(column) != len(columns[0]):
            raise UserError(
                f"{path} has {len(column)} rows but {files[0].name} has {len(columns[0])}: "
                "delete it and its .done file and evaluate again"
            )
    return [list(row) for row in zip(*columns, strict=True)]


def whole_file(path: Path) -> list[tuple[str, SampleResult]] | None:
    """`parsed_file`; None where a row is cut off or has no verdict."""
    try:
        return parsed_file(path)
    except UserError:
        return None


def parsed_file(path: Path) -> list[tuple[str, SampleResult]]:
    """`problem_key` and result of each row. Raises `UserError` naming the first that is none."""
    rows: list[tuple[str, SampleResult]] = []
    # Only "\n" ends a row: str.splitlines would also cut at separators inside a model's text.
    with path.open("rb") as file:
        for line in file:
            try:
                rows.append(_parsed_row(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{path}:{len(rows) + 1} is not a row of results ({error!r}): "
                    "delete the file and its .done file and evaluate again"
                ) from None
    return rows


def _parsed_row(row: Mapping[str, Any]) -> tuple[str, SampleResult]:
    return problem_key(row), SampleResult(
        correct=bool(row["symbolic_correct"]),
        predicted_answer=row["predicted_answer"],
        tokens=int(row.get("num_generated_tokens") or 0),
        started=row.get("generation_start_time"),
        ended=row.get("generation_end_time"),
        truncated=row.get("finish_reason") == "length",
    )


def problem_key(row: Mapping[str, Any]) -> str:
    """What two evaluations of the same problem share: the row's id, else a hash of its text."""
    if (key := row.get("id")) is not None:
        return str(key)
    return hashlib.sha256(str(row.get("problem", "")).encode()).hexdigest()[:16]


def _shown(seeds: Sequence[int]) -> str:
    """`rs0, rs3, ...`: eight at most."""
    return ", ".join([*(f"rs{seed}" for seed in seeds[:8]), *["..."] * (len(seeds) > 8)])


def _metrics(where: Path) -> dict[str, Any]:
    """The metrics of the benchmark whose folder this is; empty where they cannot be read."""
    try:
        metrics = json.loads((where / "metrics.json").read_text(encoding="utf-8"))[where.name]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return metrics if isinstance(metrics, dict) else {}


def _metrics_problem(
    metrics: Mapping[str, Any], samples_P_K: Sequence[Sequence[SampleResult]]
) -> str | None:
    """What is wrong with metrics.json: it may be older than the samples, or of fewer of them."""
    if not metrics:
        return "metrics.json is missing or broken"
    P, K = len(samples_P_K), len(samples_P_K[0])
    headline = metrics.get("pass@1" if K == 1 else f"pass@1[avg-of-{K}]")
    if headline is None or f"pass@{K + 1}" in metrics:
        return f"metrics.json is not of {K} samples"
    if headline.get("num_entries") != P:
        return f"metrics.json counts {headline.get('num_entries')} problems, not {P}"
    accuracy = 100.0 * sum(sample.correct for row in samples_P_K for sample in row) / (P * K)
    if abs(accuracy - float(headline.get("symbolic_correct", -1))) > 1e-6:
        return "metrics.json is not of these samples"
    return None

"""An evaluation's output folder, read and checked: what `ns` says about itself is not trusted.

    OUT/setting.json      what was asked for (skills.setting); a folder made by others has none
    OUT/eval-results/<bench>/output-rs{i}.jsonl (+ .done), metrics.json
        --read_results--> Results, or a `UserError` that names what is missing

NeMo-Skills exits with 0 when a job failed, and computes metrics.json from the samples that happen
to be there. Dimensions: P problems, K samples a problem.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from igrpo_nemo.errors import UserError

SETTING_FILE = "setting.json"
RESULTS_FOLDER = "eval-results"
SHOWN_SAMPLES = 8
"""A message lists no more missing samples than this."""


@dataclass(frozen=True, slots=True)
class BenchmarkResults:
    """One benchmark: P problems in the data's order, K samples each.

    Column j of the arrays is `output-rs{seeds[j]}.jsonl`. `metrics` is the benchmark's part of
    NeMo-Skills' metrics.json: mode ("pass@1[avg-of-64]") -> field ("symbolic_correct") -> number.
    """

    benchmark: str
    seeds: tuple[int, ...]
    """K seeds, ascending."""
    problems: tuple[str, ...]
    """P keys that two evaluations of the same data share: the row's id, else a hash of its text."""
    correct_P_K: np.ndarray
    """bool: the evaluator's verdict (`symbolic_correct`)."""
    answers_P_K: np.ndarray
    """object: the extracted answer (`predicted_answer`), None without one."""
    no_answer_P_K: np.ndarray
    """bool: no answer was found in the reply (`predicted_answer` is null)."""
    tokens_P_K: np.ndarray
    """int: tokens of the reply, its thinking included; 0 where the server did not say."""
    truncated_P_K: np.ndarray
    """bool: the reply was cut at its token limit (`finish_reason` is length)."""
    metrics: Mapping[str, Mapping[str, Any]]

    @property
    def num_samples(self) -> int:
        """K."""
        return len(self.seeds)


@dataclass(frozen=True, slots=True)
class Results:
    """A whole evaluation. `setting` is setting.json, empty where the folder has none."""

    folder: Path
    setting: Mapping[str, Any]
    benchmarks: Mapping[str, BenchmarkResults]


@dataclass(frozen=True, slots=True)
class SampleFile:
    """What is kept of one `output-rs{i}.jsonl`: a value a problem, in the data's order."""

    problems: tuple[str, ...]
    correct: tuple[bool, ...]
    answers: tuple[str | None, ...]
    tokens: tuple[int, ...]
    truncated: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Inspection:
    """A benchmark's folder: its whole sample files by seed, its metrics, and what is missing."""

    benchmark: str
    samples: Mapping[int, SampleFile]
    metrics: Mapping[str, Mapping[str, Any]]
    missing: tuple[str, ...]
    """Sentences; empty where the benchmark is complete."""


def read_results(folder: Path, benchmarks: Sequence[str] | None = None) -> Results:
    """The results in an evaluation's output folder, with every count checked.

    With a setting.json, its benchmarks (or those named here), their samples and problems must all
    be there; without one (an `igrpo evaluate`, a plain `ns eval`), what is there must be whole.
    Raises `UserError` naming the first benchmark that lacks something, and what.
    """
    inspections = inspected(folder, benchmarks)
    if lacking := [one for one in inspections if one.missing]:
        more = f" (and {len(lacking) - 1} more benchmarks)" if len(lacking) > 1 else ""
        reasons = "; ".join(lacking[0].missing)
        raise UserError(f"{folder} is incomplete: {lacking[0].benchmark}: {reasons}{more}")
    return results_of(folder, inspections)


def inspected(folder: Path, benchmarks: Sequence[str] | None = None) -> list[Inspection]:
    """What each benchmark of the folder (or each named one) has and lacks.

    Raises `UserError` where the folder holds no benchmark at all.
    """
    setting = read_setting(folder)
    names = benchmarks or list(setting.get("benchmarks") or _benchmarks_in(folder))
    if not names:
        raise UserError(f"{folder / RESULTS_FOLDER} holds no benchmark: evaluate into it first")
    return [inspect(folder, name, setting) for name in names]


def results_of(folder: Path, inspections: Sequence[Inspection]) -> Results:
    """The results of benchmarks that lack nothing."""
    arrays = {one.benchmark: _arrays(one) for one in inspections if not one.missing}
    return Results(folder, read_setting(folder), arrays)


def read_setting(folder: Path) -> dict[str, Any]:
    """The folder's setting.json; empty where there is none."""
    path = folder / SETTING_FILE
    try:
        setting = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(setting, dict):
        raise UserError(f"{path} holds no setting: evaluate into another folder")
    return setting


def inspect(folder: Path, benchmark: str, setting: Mapping[str, Any]) -> Inspection:
    """What a benchmark has and lacks, by its files alone: samples, rows, `.done` files, metrics."""
    where = folder / RESULTS_FOLDER / benchmark
    asked = setting.get("benchmarks", {}).get(benchmark)
    seeds = list(range(asked)) if asked else _seeds_in(where)
    if not seeds:
        return Inspection(benchmark, {}, {}, ("no samples (output-rs*.jsonl)",))
    present = [seed for seed in seeds if sample_path(where, seed).is_file()]
    done = [seed for seed in present if done_path(where, seed).is_file()]
    files = {seed: read_sample_file(sample_path(where, seed)) for seed in done}
    whole = {seed: file for seed, file in files.items() if file is not None}
    rows = setting.get("problems", {}).get(benchmark, {}).get("rows")
    rows = rows or max((len(file.correct) for file in whole.values()), default=0)

    missing = []
    if absent := [seed for seed in seeds if seed not in present]:
        missing.append(f"{len(absent)} of {len(seeds)} samples are missing ({_shown(absent)})")
    if unfinished := [seed for seed in present if seed not in done]:
        count = f"{len(unfinished)} of {len(seeds)} samples"
        missing.append(f"{count} are unfinished ({_shown(unfinished)})")
    if broken := [seed for seed in done if seed not in whole]:
        missing.append(f"a row is broken in {_shown(broken)}")
    if short := [seed for seed, file in whole.items() if len(file.correct) != rows]:
        found = len(whole[short[0]].correct)
        missing.append(f"{_shown(short)} should have {rows} rows, rs{short[0]} has {found}")
    elif mixed := [seed for seed, file in whole.items() if file.problems != _first(whole).problems]:
        missing.append(f"{_shown(mixed)} holds other problems than rs{min(whole)}")
    metrics = _metrics(where, benchmark)
    if not missing and (problem := _metrics_problem(metrics, list(whole.values()))):
        missing.append(problem)
    return Inspection(benchmark, whole, metrics or {}, tuple(missing))


def sample_path(where: Path, seed: int) -> Path:
    """NeMo-Skills' file of sample number `seed` of every problem."""
    return where / f"output-rs{seed}.jsonl"


def done_path(where: Path, seed: int) -> Path:
    """The marker that NeMo-Skills leaves beside a finished sample file."""
    return where / f"output-rs{seed}.jsonl.done"


def read_sample_file(path: Path) -> SampleFile | None:
    """A sample file; None where a row is cut off or has no verdict."""
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            rows = [_verdict(json.loads(line)) for line in file]
    except (ValueError, KeyError, TypeError):
        return None
    columns = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    return SampleFile(*(tuple(column) for column in columns))


def problem_key(row: Mapping[str, Any]) -> str:
    """What a problem is recognised by across evaluations: its id, else a hash of its text."""
    if row.get("id") is not None:
        return str(row["id"])
    return hashlib.sha256(str(row.get("problem", "")).encode()).hexdigest()[:16]


def _verdict(row: Mapping[str, Any]) -> tuple[str, bool, str | None, int, bool]:
    return (
        problem_key(row),
        bool(row["symbolic_correct"]),
        row["predicted_answer"],
        int(row.get("num_generated_tokens") or 0),
        row.get("finish_reason") == "length",
    )


def _benchmarks_in(folder: Path) -> list[str]:
    where = folder / RESULTS_FOLDER
    return sorted(path.name for path in where.iterdir() if path.is_dir()) if where.is_dir() else []


def _seeds_in(where: Path) -> list[int]:
    names = (path.stem.removeprefix("output-rs") for path in where.glob("output-rs*.jsonl"))
    return sorted(int(name) for name in names if name.isdecimal())


def _shown(seeds: Sequence[int]) -> str:
    names = ", ".join(f"rs{seed}" for seed in seeds[:SHOWN_SAMPLES])
    return names if len(seeds) <= SHOWN_SAMPLES else f"{names}, ..."


def _first(files: Mapping[int, SampleFile]) -> SampleFile:
    return files[min(files)]


def _metrics(where: Path, benchmark: str) -> dict[str, Any] | None:
    try:
        metrics = json.loads((where / "metrics.json").read_text(encoding="utf-8"))[benchmark]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return metrics if isinstance(metrics, dict) else None


def _metrics_problem(
    metrics: Mapping[str, Any] | None, samples: Sequence[SampleFile]
) -> str | None:
    """What is wrong with metrics.json: it may be older than the samples, or of fewer of them."""
    if metrics is None:
        return "metrics.json is missing or broken"
    K = len(samples)
    headline = metrics.get("pass@1" if K == 1 else f"pass@1[avg-of-{K}]")
    if headline is None or f"pass@{K + 1}" in metrics:
        return f"metrics.json is not of {K} samples"
    rows = len(samples[0].correct)
    if headline.get("num_entries") != rows:
        return f"metrics.json counts {headline.get('num_entries')} problems, not {rows}"
    accuracy = 100.0 * sum(sum(file.correct) for file in samples) / (K * rows)
    if abs(accuracy - float(headline.get("symbolic_correct", -1))) > 1e-6:
        return "metrics.json is not of these samples"
    return None


def _arrays(inspection: Inspection) -> BenchmarkResults:
    files = inspection.samples
    seeds = tuple(sorted(files))

    def columns(field: str, dtype: type) -> np.ndarray:
        return np.array([getattr(files[seed], field) for seed in seeds], dtype=dtype).T

    answers_P_K = columns("answers", object)
    return BenchmarkResults(
        benchmark=inspection.benchmark,
        seeds=seeds,
        problems=_first(files).problems,
        correct_P_K=columns("correct", bool),
        answers_P_K=answers_P_K,
        no_answer_P_K=np.array([[a is None for a in row] for row in answers_P_K], dtype=bool),
        tokens_P_K=columns("tokens", np.int64),
        truncated_P_K=columns("truncated", bool),
        metrics=inspection.metrics,
    )

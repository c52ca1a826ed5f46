"""The files of an evaluation, in NeMo-Skills' layout, and the check that they belong together.

eval-results/<benchmark>/  output-rs{i}.jsonl   sample i of every problem, one a line
                           output-rs{i}.jsonl.done   it is whole: not sampled again
                           metrics.json         {benchmark: evaluation.bench_metrics}
                           evaluation.json      ours: how the samples were made
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.metrics import SampleResult
from igrpo_nemo.files.atomic import write_atomic


def finished_files(folder: Path) -> list[Path]:
    """The `output-rs*.jsonl` with a `.done` file, in NeMo-Skills' order.

    That order is by *name* (rs0, rs1, rs10, rs2, ...), and decides which samples the first k are.
    """
    files = sorted(folder.glob("output-rs*.jsonl"), key=lambda path: path.name)
    return [path for path in files if is_finished(path)]


def read_samples(files: Sequence[Path]) -> list[list[SampleResult]]:
    """samples_P_K from K files with one row a problem in the same order.

    Raises `UserError` naming the file and line that is not a result, or the file that is shorter.
    """
    columns = [[_parse_row(path, n, line) for n, line in _lines(path)] for path in files]
    for path, column in zip(files, columns, strict=True):
        if len(column) != len(columns[0]):
            raise UserError(
                f"{path} has {len(column)} rows but {files[0].name} has {len(columns[0])}: "
                "delete it and its .done file and evaluate again"
            )
    return [list(row) for row in zip(*columns, strict=True)]


def write_metrics(path: Path, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `metrics.json`: {bench: bench_metrics}."""
    write_atomic(path, json.dumps(metrics, indent=2).encode("ascii"))


def weights_fingerprint(model: Path) -> str:
    """Short hash that tells two sets of weights apart: names, sizes and both ends of each file.

    A Hugging Face name that is no folder stands for itself. Training changes every parameter, so
    the ends suffice, and a 14B model need not be read twice.
    """
    if not model.is_dir():
        return str(model)
    digest = hashlib.sha256()
    files = sorted([*model.glob("*.safetensors"), *model.glob("*.bin"), *model.glob("config.json")])
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 16))
            file.seek(max(0, path.stat().st_size - (1 << 16)))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def sample_file(folder: Path, seed: int) -> Path:
    """Where sample number `seed` of every problem stands."""
    return folder / f"output-rs{seed}.jsonl"


def is_finished(path: Path) -> bool:
    """Whether a sample file is whole."""
    return _done(path).exists()


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a sample file, and its `.done` once it is whole."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode("ascii"))
    _done(path).touch()


def check_same_evaluation(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Keep samples of different settings apart: a `.done` file does not say how it was made.

    The first evaluation in a folder leaves its fingerprint there; another one raises `UserError`
    naming what differs.
    """
    path = folder / "evaluation.json"
    wanted = json.loads(json.dumps(dict(fingerprint)))
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            raise UserError(f"{path} is not JSON: evaluate into another folder") from None
        changed = [name for name in wanted if found.get(name) != wanted[name]]
        if changed:
            name = changed[0]
            raise UserError(
                f"{folder} holds samples of another evaluation ({name} was "
                f"{found.get(name)}, is {wanted[name]}): use another output folder (--out)"
            )
    elif finished_files(folder):
        raise UserError(
            f"{folder} holds samples that another program made: use another output folder (--out)"
        )
    write_atomic(path, json.dumps(wanted, indent=2).encode())


def _done(path: Path) -> Path:
    return path.with_name(path.name + ".done")


def _lines(path: Path) -> list[tuple[int, str]]:
    # Only "\n" ends a row: str.splitlines would also cut at separators inside a model's text.
    with path.open(encoding="utf-8", newline="\n") as file:
        return list(enumerate(file, start=1))


def _parse_row(path: Path, number: int, line: str) -> SampleResult:
    try:
        row = json.loads(line)
        return SampleResult(
            correct=bool(row["symbolic_correct"]),
            predicted_answer=row["predicted_answer"],
            tokens=int(row.get("num_generated_tokens", 0)),
            started=row.get("generation_start_time"),
            ended=row.get("generation_end_time"),
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}:{number} is not a row of results ({error!r}): "
            "delete the file and its .done file and evaluate again"
        ) from None

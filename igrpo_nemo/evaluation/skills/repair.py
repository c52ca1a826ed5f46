"""Sample files that a crash left half-written, made such that NeMo-Skills completes them.

    output-rs{i}.jsonl, -async, .done --whole rows by problem--> -async, to be continued
                                                              -> output (+ .done) where none lacks

NeMo-Skills appends finished rows to `-async` and rewrites them in order at the end. Left alone, it
takes any output file for finished, stops at a row that was cut off, and marks a file as done that
it never wrote if the crash came before the rewriting. Whole rows are kept, and not sampled again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from igrpo_nemo.evaluation.results import (
    RESULTS_FOLDER,
    done_path,
    json_lines,
    sample_path,
    whole_file,
)
from igrpo_nemo.files.atomic import write_atomic

POSITION = "_async_position"
"""NeMo-Skills' key of a row's place in the data, in `-async` files."""

Row = dict[str, Any]


def repair(folder: Path, benchmark: str, samples: int, rows: Sequence[Mapping[str, Any]]) -> int:
    """Mends the sample files of a benchmark whose data has `rows`; returns how many it touched.

    Afterwards a file with a `.done` beside it is whole, and any other one is such that `ns eval`
    goes on where it stopped. metrics.json is removed where a sample is unfinished.
    """
    where = folder / RESULTS_FOLDER / benchmark
    if not where.is_dir():
        return 0
    problems = [str(row["problem"]) for row in rows]
    unfinished = [seed for seed in range(samples) if not _is_whole(where, seed, len(problems))]
    if unfinished:
        (where / "metrics.json").unlink(missing_ok=True)
    return sum([_mend(where, seed, problems) for seed in unfinished])


def _is_whole(where: Path, seed: int, rows: int) -> bool:
    path = sample_path(where, seed)
    if not (done_path(where, seed).is_file() and path.is_file()):
        return False
    file = whole_file(path)
    return file is not None and len(file) == rows


def _mend(where: Path, seed: int, problems: Sequence[str]) -> bool:
    """Collects the whole rows of one seed and puts them where NeMo-Skills looks for them."""
    output, done = sample_path(where, seed), done_path(where, seed)
    unordered = output.with_name(f"{output.name}-async")
    if not any(path.is_file() for path in (output, done, unordered)):
        return False
    found = {**_whole_rows(output, problems), **_whole_rows(unordered, problems)}
    done.unlink(missing_ok=True)
    # Written before the other file goes: a crash in between loses no row.
    if len(found) == len(problems):
        write_atomic(output, json_lines([found[position] for position in range(len(problems))]))
        unordered.unlink(missing_ok=True)
        # Multiple choice is judged in a last pass over the file, which NeMo-Skills still does.
        if all("symbolic_correct" in row for row in found.values()):
            done.touch()
        return True
    if found:
        rows = [{**row, POSITION: position} for position, row in found.items()]
        write_atomic(unordered, json_lines(rows))
    else:
        unordered.unlink(missing_ok=True)
    output.unlink(missing_ok=True)
    return True


def _whole_rows(path: Path, problems: Sequence[str]) -> dict[int, Row]:
    """Place in the data -> row, of the lines that answer the problem of their place. A line of an
    `-async` file carries its place; row j of an output file answers problem j."""
    found: dict[int, Row] = {}
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not isinstance(row, dict) or "generation" not in row:
            continue
        position = row.pop(POSITION, number)
        if position in range(len(problems)) and row.get("problem") == problems[position]:
            found.setdefault(position, row)
    return found

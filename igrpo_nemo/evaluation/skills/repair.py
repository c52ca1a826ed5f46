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

from igrpo_nemo.evaluation.results import RESULTS_FOLDER, done_path, read_sample_file, sample_path
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
    touched = [_mend(where, seed, problems) for seed in unfinished]
    if unfinished:
        (where / "metrics.json").unlink(missing_ok=True)
    return sum(touched)


def _is_whole(where: Path, seed: int, rows: int) -> bool:
    if not done_path(where, seed).is_file() or not sample_path(where, seed).is_file():
        return False
    file = read_sample_file(sample_path(where, seed))
    return file is not None and len(file.samples) == rows


def _mend(where: Path, seed: int, problems: Sequence[str]) -> bool:
    """Collects the whole rows of one seed and puts them where NeMo-Skills looks for them."""
    output, done = sample_path(where, seed), done_path(where, seed)
    unordered = output.with_name(f"{output.name}-async")
    before = [path for path in (output, done, unordered) if path.is_file()]
    if not before:
        return False
    found = {**_rows_in_order(output, problems), **_rows_by_position(unordered, problems)}
    done.unlink(missing_ok=True)
    if len(found) == len(problems):
        lines = [json.dumps(found[position]) for position in range(len(problems))]
        write_atomic(output, "".join(f"{line}\n" for line in lines).encode("ascii"))
        unordered.unlink(missing_ok=True)
        # Multiple choice is judged in a last pass over the file, which NeMo-Skills still does.
        if all("symbolic_correct" in row for row in found.values()):
            done.touch()
        return True
    if found:
        lines = [json.dumps({**row, POSITION: position}) for position, row in found.items()]
        write_atomic(unordered, "".join(f"{line}\n" for line in lines).encode("ascii"))
    else:
        unordered.unlink(missing_ok=True)
    output.unlink(missing_ok=True)
    return True


def _rows_in_order(path: Path, problems: Sequence[str]) -> dict[int, Row]:
    """The rows of an output file: row j answers problem j."""
    return {
        position: row
        for position, row in enumerate(_parsed(path))
        if row is not None and position < len(problems) and row["problem"] == problems[position]
    }


def _rows_by_position(path: Path, problems: Sequence[str]) -> dict[int, Row]:
    """The rows of an `-async` file, which carry their position."""
    found: dict[int, Row] = {}
    for row in _parsed(path):
        position = row.pop(POSITION, None) if row is not None else None
        if row is None or not isinstance(position, int) or not 0 <= position < len(problems):
            continue
        if row["problem"] == problems[position]:
            found.setdefault(position, row)
    return found


def _parsed(path: Path) -> list[Row | None]:
    """The lines of a file as rows; None for one that is no row with a problem and a reply."""
    if not path.is_file():
        return []
    return [_row(line) for line in path.read_bytes().split(b"\n") if line.strip()]


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(row, dict) and "problem" in row and "generation" in row
    return row if whole else None

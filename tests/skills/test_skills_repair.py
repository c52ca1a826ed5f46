"""Half-written sample files: whole rows are kept, nothing that is broken is taken for finished."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from sample_files import PROBLEMS, row, whole_benchmark, write_sample, write_unordered

from igrpo_nemo.evaluation.skills.repair import POSITION, repair

DATA = [{"problem": text} for text in PROBLEMS]
IN_ORDER = {i: row(text) for i, text in enumerate(PROBLEMS)}
FINISHED = {"output-rs0.jsonl", "output-rs0.jsonl.done"}


def kept(where: Path, seed: int) -> dict[int, str]:
    """Position -> problem, of the rows that NeMo-Skills will not sample again."""
    path = where / f"output-rs{seed}.jsonl-async"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {one[POSITION]: one["problem"] for one in rows}


def names(where: Path) -> set[str]:
    return {path.name for path in where.iterdir()}


def test_a_whole_evaluation_is_left_as_it_is_and_none_is_made(tmp_path: Path) -> None:
    assert repair(tmp_path, "toy", 2, DATA) == 0 and not (tmp_path / "eval-results").exists()
    where = whole_benchmark(tmp_path)
    before = {path: path.read_bytes() for path in where.iterdir()}
    assert repair(tmp_path, "toy", 2, DATA) == 0
    assert {path: path.read_bytes() for path in where.iterdir()} == before


def test_a_finished_file_that_was_cut_off_and_a_done_marker_without_its_file(
    tmp_path: Path,
) -> None:
    where = whole_benchmark(tmp_path)
    path = where / "output-rs1.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    assert repair(tmp_path, "toy", 2, DATA) == 1
    assert kept(where, 1) == {0: "one?", 1: "two?"}
    assert names(where) == FINISHED | {"output-rs1.jsonl-async"}
    (where / "output-rs0.jsonl").unlink()
    assert repair(tmp_path, "toy", 1, DATA) == 1 and names(where) == {"output-rs1.jsonl-async"}


def torn(where: Path) -> None:
    path = write_unordered(where, 0, {2: row("three?"), 0: row("one?")})
    with path.open("a") as file:
        file.write('{"problem": "two?", "generation": "half')


def of_other_problems(where: Path) -> None:
    write_unordered(where, 0, {0: row("one?"), 1: row("another?"), 7: row("three?")})


@pytest.mark.parametrize(
    ("write", "rows"), [(torn, {0: "one?", 2: "three?"}), (of_other_problems, {0: "one?"})]
)
def test_whole_rows_of_these_problems_are_kept(
    tmp_path: Path, write: Callable[[Path], None], rows: dict[int, str]
) -> None:
    write(where := tmp_path / "eval-results" / "toy")
    assert repair(tmp_path, "toy", 1, DATA) == 1
    assert kept(where, 0) == rows


@pytest.mark.parametrize("half_written", [False, True])
def test_all_rows_are_there_but_not_in_order(tmp_path: Path, half_written: bool) -> None:
    """NeMo-Skills would mark a file as done that it never wrote, or take half of one for it."""
    where = tmp_path / "eval-results" / "toy"
    write_unordered(where, 0, {i: IN_ORDER[i] for i in (2, 0, 1)})
    if half_written:
        write_sample(where, 0, [row("one?")], done=False)
    repair(tmp_path, "toy", 1, DATA)
    assert names(where) == FINISHED
    rows = [json.loads(line) for line in (where / "output-rs0.jsonl").read_text().splitlines()]
    assert rows == list(IN_ORDER.values())


def test_replies_without_a_verdict_wait_for_it(tmp_path: Path) -> None:
    """Multiple choice is judged at the end: the replies are whole, the file is not finished."""
    where = tmp_path / "eval-results" / "toy"
    write_sample(where, 0, [{"problem": p, "generation": "A"} for p in PROBLEMS], done=False)
    repair(tmp_path, "toy", 1, DATA)
    assert names(where) == {"output-rs0.jsonl"}

"""Half-written sample files: whole rows are kept, nothing that is broken is taken for finished."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sample_files import PROBLEMS, row, whole_benchmark, write_sample, write_unordered

from igrpo_nemo.evaluation.skills.repair import POSITION, repair

DATA = [{"problem": text} for text in PROBLEMS]


@pytest.fixture
def where(tmp_path: Path) -> Path:
    return tmp_path / "eval-results" / "toy"


def kept(where: Path, seed: int) -> dict[int, str]:
    """Position -> problem, of the rows that NeMo-Skills will not sample again."""
    path = where / f"output-rs{seed}.jsonl-async"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {one[POSITION]: one["problem"] for one in rows}


def names(where: Path) -> set[str]:
    return {path.name for path in where.iterdir()}


def test_a_whole_evaluation_is_left_as_it_is(tmp_path: Path) -> None:
    where = whole_benchmark(tmp_path)
    before = {path: path.read_bytes() for path in where.iterdir()}
    assert repair(tmp_path, "toy", 2, DATA) == 0
    assert {path: path.read_bytes() for path in where.iterdir()} == before


def test_nothing_there_yet(tmp_path: Path) -> None:
    assert repair(tmp_path, "toy", 2, DATA) == 0
    assert not tmp_path.joinpath("eval-results").exists()


def test_a_finished_file_that_was_cut_off(tmp_path: Path) -> None:
    where = whole_benchmark(tmp_path)
    path = where / "output-rs1.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    assert repair(tmp_path, "toy", 2, DATA) == 1
    assert kept(where, 1) == {0: "one?", 1: "two?"}
    assert names(where) == {"output-rs0.jsonl", "output-rs0.jsonl.done", "output-rs1.jsonl-async"}


def test_a_torn_line_of_the_unordered_file(tmp_path: Path, where: Path) -> None:
    path = write_unordered(where, 0, {2: row("three?"), 0: row("one?")})
    with path.open("a") as file:
        file.write('{"problem": "two?", "generation": "half')
    assert repair(tmp_path, "toy", 1, DATA) == 1
    assert kept(where, 0) == {0: "one?", 2: "three?"}


def test_all_rows_are_there_but_not_in_order(tmp_path: Path, where: Path) -> None:
    """NeMo-Skills would mark a file as done that it never wrote."""
    write_unordered(where, 0, {2: row("three?"), 0: row("one?"), 1: row("two?")})
    repair(tmp_path, "toy", 1, DATA)
    assert names(where) == {"output-rs0.jsonl", "output-rs0.jsonl.done"}
    rows = [json.loads(line) for line in (where / "output-rs0.jsonl").read_text().splitlines()]
    assert [one["problem"] for one in rows] == list(PROBLEMS)
    assert all(POSITION not in one for one in rows)


def test_cut_off_while_the_order_was_restored(tmp_path: Path, where: Path) -> None:
    """Both files are there; NeMo-Skills would take the half-written one for finished."""
    write_unordered(where, 0, {i: row(text) for i, text in enumerate(PROBLEMS)})
    write_sample(where, 0, [row("one?")], done=False)
    repair(tmp_path, "toy", 1, DATA)
    assert names(where) == {"output-rs0.jsonl", "output-rs0.jsonl.done"}
    assert len((where / "output-rs0.jsonl").read_text().splitlines()) == 3


def test_a_done_marker_without_its_file(tmp_path: Path) -> None:
    where = whole_benchmark(tmp_path)
    (where / "output-rs0.jsonl").unlink()
    assert repair(tmp_path, "toy", 2, DATA) == 1
    assert names(where) == {"output-rs1.jsonl", "output-rs1.jsonl.done"}


def test_rows_of_other_problems_are_dropped(tmp_path: Path, where: Path) -> None:
    write_unordered(where, 0, {0: row("one?"), 1: row("another?"), 7: row("three?")})
    repair(tmp_path, "toy", 1, DATA)
    assert kept(where, 0) == {0: "one?"}


def test_replies_without_a_verdict_wait_for_it(tmp_path: Path, where: Path) -> None:
    """Multiple choice is judged at the end: the replies are whole, the file is not finished."""
    replies = [{"problem": text, "generation": "A"} for text in PROBLEMS]
    write_sample(where, 0, replies, done=False)
    repair(tmp_path, "toy", 1, DATA)
    assert names(where) == {"output-rs0.jsonl"}

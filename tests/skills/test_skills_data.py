"""Evaluation data: counted, checked, laid out for NeMo-Skills."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from skills_runs import pipeline

from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.skills.data import (
    BENCHMARKS,
    benchmark_named,
    checked_rows,
    freeze,
    read_benchmark,
    rows_of_file,
    write_benchmark,
)
from igrpo_nemo.evaluation.skills.program import SkillsEnvironment

MINE = benchmark_named("mine")


def rows(count: int, answer: object = "4") -> list[dict]:
    return [{"problem": f"{i}?", "expected_answer": answer} for i in range(count)]


def test_known_benchmarks_are_counted() -> None:
    sizes = {name: one.rows for name, one in BENCHMARKS.items()}
    assert sizes["aime24"] == sizes["aime25"] == 30 and sizes["math-500"] == 500
    assert (sizes["amc23"], sizes["gsm8k"], sizes["minerva_math"]) == (40, 1319, 272)
    assert (sizes["gpqa"], sizes["mmlu-pro"]) == (198, 12032)
    assert len(checked_rows(BENCHMARKS["aime24"], rows(30), "file")) == 30
    with pytest.raises(UserError, match="file has 29 rows, but aime24 has 30"):
        checked_rows(BENCHMARKS["aime24"], rows(29), "file")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"expected_answer": "4"}, "row 2 has no problem"),
        ({"problem": " ", "expected_answer": "4"}, "row 2 has no problem"),
        ({"problem": "0?"}, "repeats the problem of row 1"),
        ({"problem": "1?"}, "row 2 has no expected_answer"),
        ({"problem": "1?", "expected_answer": None}, "row 2 has no expected_answer"),
        ({"problem": "1?", "expected_answer": " "}, "row 2 has no expected_answer"),
        ({"problem": "1?", "expected_answer": True}, "row 2 has no expected_answer"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named(row: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        checked_rows(MINE, [*rows(1), row], "file")


def test_integer_answers_are_written_as_integers() -> None:
    """NeMo-Skills compares "073" and "73" as texts, and finds them different."""
    for given, written in (("073", "73"), (27.0, "27"), ("27.0", "27"), (5, "5"), ("0", "0")):
        checked = checked_rows(BENCHMARKS["aime24"], rows(30, given), "file")
        assert {row["expected_answer"] for row in checked} == {written}
    with pytest.raises(UserError, match="the answer 1/2 is no integer"):
        checked_rows(BENCHMARKS["aime24"], rows(30, "1/2"), "file")
    assert checked_rows(MINE, rows(1, "1/2"), "file")[0]["expected_answer"] == "1/2"


def test_the_answer_to_multiple_choice_is_an_option() -> None:
    gpqa = BENCHMARKS["gpqa"]
    options = {"A": "x", "B": "y"}
    given = [{**row, **options} for row in rows(198, "B")]
    assert checked_rows(gpqa, given, "file")[0]["expected_answer"] == "B"
    with pytest.raises(UserError, match="the answer E is none of its options"):
        checked_rows(gpqa, [{**row, **options} for row in rows(198, "E")], "file")


def test_the_layout_that_nemo_skills_reads(tmp_path: Path) -> None:
    path = write_benchmark(tmp_path, "mine", checked_rows(MINE, rows(2, 7), "file"))
    assert path == tmp_path / "mine" / "test.jsonl"
    module: dict[str, str] = {}
    exec((tmp_path / "mine" / "__init__.py").read_text(), module)
    assert module["METRICS_TYPE"] == "math" and "eval_type=math" in module["GENERATION_ARGS"]
    data = read_benchmark(tmp_path, "mine")
    assert [row["expected_answer"] for row in data.rows] == ["7", "7"]
    copy = read_benchmark(freeze([data], tmp_path / "out"), "mine")
    assert copy.sha256 == data.sha256 and copy.path != data.path
    write_benchmark(tmp_path, "mine", checked_rows(MINE, rows(2, 8), "file"))
    assert read_benchmark(tmp_path, "mine").sha256 != data.sha256


def test_data_that_is_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prepare_data.py --out \S+ aime24"):
        read_benchmark(tmp_path, "aime24")
    path = write_benchmark(tmp_path, "mine", rows(1))
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(UserError, match="cannot be read"):
        read_benchmark(tmp_path, "mine")


def test_files_of_other_shapes(tmp_path: Path) -> None:
    file = tmp_path / "gsm.jsonl"
    lines = [{"question": f"{i}?", "answer": f"so #### {i}"} for i in range(3)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = rows_of_file(file)
    assert [row["expected_answer"] for row in found] == ["0", "1", "2"]
    assert [row["problem"] for row in found] == ["0?", "1?", "2?"]


def test_the_script_prepares_files(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(3)))
    ended = pipeline("prepare_data.py", "--out", str(tmp_path / "data"), f"mine={file}")
    assert ended.code == 0 and "mine: 3 problems" in ended.out
    assert len(read_benchmark(tmp_path / "data", "mine").rows) == 3
    ended = pipeline("prepare_data.py", "--out", str(tmp_path / "data"), f"aime24={file}")
    assert ended.code == 2 and ended.err.count("\n") == 1
    assert "has 3 rows, but aime24 has 30" in ended.err


@pytest.mark.timeout(600)
def test_nemo_skills_prepares_what_comes_with_it(skills: SkillsEnvironment, tmp_path: Path) -> None:
    out = tmp_path / "data"
    ended = pipeline("prepare_data.py", "--out", str(out), "aime24", env=skills.bin.parent)
    assert ended.code == 0, ended.err
    rows = read_benchmark(out, "aime24").rows
    assert len(rows) == 30 and all(row["expected_answer"].isdecimal() for row in rows)
    ended = pipeline("prepare_data.py", "--out", str(out), "nosuch", env=skills.bin.parent)
    assert ended.code == 2 and "NeMo-Skills knows no benchmark nosuch" in ended.err

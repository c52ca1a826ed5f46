"""Reading results: whatever is missing or does not belong together is named, not averaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sample_files import PROBLEMS, row, whole_benchmark, write_metrics, write_sample

from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.results import read_results


def setting(out: Path, samples: int = 2, rows: int = 3) -> None:
    values = {"benchmarks": {"toy": samples}, "problems": {"toy": {"rows": rows}}}
    (out / "setting.json").write_text(json.dumps(values))


def test_a_whole_evaluation(tmp_path: Path) -> None:
    whole_benchmark(tmp_path)
    setting(tmp_path)
    toy = read_results(tmp_path).benchmarks["toy"]
    assert toy.num_samples == 2 and toy.seeds == (0, 1)
    assert toy.correct_P_K.tolist() == [[True, True], [True, False], [False, False]]
    assert not toy.no_answer_P_K.any() and not toy.truncated_P_K.any()
    assert (toy.tokens_P_K == 7).all() and len(set(toy.problems)) == 3
    assert toy.metrics["pass@1[avg-of-2]"]["symbolic_correct"] == pytest.approx(50.0)


def test_a_folder_without_a_setting_is_read_as_it_is(tmp_path: Path) -> None:
    whole_benchmark(tmp_path, samples=1)
    assert read_results(tmp_path).setting == {}
    with pytest.raises(UserError, match="holds no benchmark"):
        read_results(tmp_path / "elsewhere")


def refusal(out: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_results(out)
    return str(caught.value)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    where = whole_benchmark(tmp_path)
    setting(tmp_path, samples=3)
    assert "toy: 1 of 3 samples are missing (rs2)" in refusal(tmp_path)
    write_sample(where, 2, [row(p) for p in PROBLEMS], done=False)
    assert "1 of 3 samples are unfinished (rs2)" in refusal(tmp_path)
    write_sample(where, 2, [row(p) for p in PROBLEMS[:2]])
    assert "rs2 should have 3 rows, rs2 has 2" in refusal(tmp_path)
    write_sample(where, 2, [row(p) for p in reversed(PROBLEMS)])
    assert "rs2 holds other problems than rs0" in refusal(tmp_path)
    (where / "output-rs2.jsonl").write_text('{"problem": "one?", "gener')
    assert "a row is broken in rs2" in refusal(tmp_path)


def test_a_row_without_a_verdict_is_broken(tmp_path: Path) -> None:
    where = whole_benchmark(tmp_path)
    unjudged = {key: value for key, value in row("one?").items() if key != "symbolic_correct"}
    write_sample(where, 1, [unjudged, row("two?"), row("three?")])
    assert "a row is broken in rs1" in refusal(tmp_path)


def test_metrics_of_other_samples_are_not_believed(tmp_path: Path) -> None:
    where = whole_benchmark(tmp_path, samples=2)
    setting(tmp_path, samples=3)
    write_sample(where, 2, [row(p) for p in PROBLEMS])
    assert "metrics.json is not of 3 samples" in refusal(tmp_path)
    write_metrics(where)
    assert read_results(tmp_path).benchmarks["toy"].num_samples == 3
    write_sample(where, 2, [row(p, False) for p in PROBLEMS])
    assert "metrics.json is not of these samples" in refusal(tmp_path)
    (where / "metrics.json").unlink()
    assert "metrics.json is missing" in refusal(tmp_path)


def test_a_setting_asks_for_its_rows(tmp_path: Path) -> None:
    whole_benchmark(tmp_path)
    setting(tmp_path, rows=4)
    assert "rs0, rs1 should have 4 rows, rs0 has 3" in refusal(tmp_path)

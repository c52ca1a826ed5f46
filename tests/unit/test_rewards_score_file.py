"""`igrpo score` and `igrpo_nemo.score`: completions in, verdicts and a summary out."""

import argparse
import json
import os

import pytest
from cases import cases

import igrpo_nemo
from igrpo_nemo.cli import main, score
from igrpo_nemo.errors import UserError

CASES = cases(__file__)


def _run(capsys, *words: str) -> dict:
    parser = argparse.ArgumentParser()
    score.COMMAND.add_flags(parser)
    flags, rest = parser.parse_known_args(words)
    assert score.run(flags, rest) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def completions(tmp_path):
    rows = [
        {"a": "5", "c": ["<answer>5</answer>", "\\boxed{6}"]},
        {"a": "#### 1,000", "c": "<think>a</think>\\boxed{1000}"},
        {"a": 0.5, "c": ["no idea"]},
        {"a": "<answer>7</answer>", "c": ["<answer>7</answer> \\boxed{8}"]},
    ]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_row_without_a_reference_is_not_counted_as_wrong(tmp_path, capsys):
    path = tmp_path / "c.jsonl"
    answers = ["5", "N/A", "", ["1", "2"], "5"]
    completions = ["\\boxed{5}", "\\boxed{5}", "\\boxed{5}", "\\boxed{1}", "\\boxed{6}"]
    rows = [{"a": a, "c": c} for a, c in zip(answers, completions, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = _run(capsys, str(path), "--answer-key", "a", "--completion-key", "c")
    assert summary == {
        "accuracy": 0.5,
        "n": 2,
        "reasons": {"match": 1, "mismatch": 1, "no_reference": 3},
    }
    lines = path.with_name("c.verdicts.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in lines[1:4]] == ["no_reference"] * 3


def test_a_file_is_scored_row_by_row_and_sample_by_sample(completions, capsys):
    words = [str(completions), "--answer-key", "a", "--completion-key", "c", "--workers", "1"]
    summary = _run(capsys, *words)
    assert summary == {
        "accuracy": 0.6,
        "n": 5,
        "reasons": {"match": 3, "mismatch": 1, "no_answer": 1},
    }
    lines = completions.with_name("c.verdicts.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"row": 0, "sample": 0, "correct": True, "reason": "match"},
        {"row": 0, "sample": 1, "correct": False, "reason": "mismatch"},
        {"row": 1, "sample": 0, "correct": True, "reason": "match"},
        {"row": 2, "sample": 0, "correct": False, "reason": "no_answer"},
        {"row": 3, "sample": 0, "correct": True, "reason": "match"},
    ]


def test_a_function_of_ones_own_is_called_on_every_completion(tmp_path, capsys):
    path = tmp_path / "c.jsonl"
    rows = [{"a": "abc", "c": ["abc", "x" * 8], "longest": 8}, {"a": "5", "c": "5", "longest": 2}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [str(path), "--answer-key", "a", "--completion-key", "c", "--workers", "1"]
    summary = _run(capsys, *words, "--reward", "own_rewards:share", "--reward", "own_rewards:parts")
    assert summary["rewards"] == {
        "share": pytest.approx((3 / 8 + 1 + 1 / 2) / 3),
        "share/failed": 0.0,
        "parts/short": pytest.approx(2 / 3),
        "parts/same": pytest.approx(1 / 3),
        "parts": 1.0,
        "parts/failed": 0.0,
    }
    lines = path.with_name("c.verdicts.jsonl").read_text().splitlines()
    assert [json.loads(line)["rewards"]["share"] for line in lines] == [0.375, 1.0, 0.5]
    with pytest.raises(UserError, match="the reward function own_rewards:none cannot be imported"):
        _run(capsys, *words, "--reward", "own_rewards:none")


def test_the_answer_format_and_the_output_are_options(completions, capsys, tmp_path):
    out = tmp_path / "else.jsonl"
    summary = _run(
        capsys,
        *(str(completions), "--answer-key", "a", "--completion-key", "c", "--workers", "1"),
        *("--answer-format", "tags", "--out", str(out)),
    )
    assert summary["reasons"] == {"match": 2, "no_answer": 3}
    assert len(out.read_text().splitlines()) == 5
    assert not completions.with_name("c.verdicts.jsonl").exists()


@pytest.mark.parametrize(("content", "message"), CASES["bad_files"])
def test_bad_files_are_named_with_the_place(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        score.score_file(path, answer_key="a", completion_key="c", workers=1)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("out", "message"), CASES["outputs"])
def test_the_output_is_looked_at_before_the_work(completions, monkeypatch, out, message):
    folder, before = completions.parent, completions.read_bytes()
    (folder / "link.jsonl").symlink_to(completions)
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    monkeypatch.setattr(score, "score_file", None)
    parser = argparse.ArgumentParser()
    score.COMMAND.add_flags(parser)
    words = ["--answer-key", "a", "--completion-key", "c", "--out", str(folder / out)]
    with pytest.raises(UserError, match=message):
        score.run(parser.parse_args(words), [str(completions)])
    assert completions.read_bytes() == before


@pytest.mark.parametrize("seconds", ["nan", "inf", "0", "-1", "1e10", "soon"])
def test_the_limit_of_an_item_is_a_number_of_seconds(completions, capsys, seconds):
    words = ["--answer-key", "a", "--completion-key", "c", "--item-timeout", seconds]
    assert main(["score", str(completions), *words]) == 2
    assert "argument --item-timeout" in capsys.readouterr().err


def test_from_python_it_is_lists_in_and_verdicts_out():
    references = [5, "a long way to \\boxed{7}", None]
    completions = ["<answer>5</answer>", ("\\boxed{7}", "<answer>8</answer>"), "\\boxed{1}"]
    scores = igrpo_nemo.score(references, completions, answer_format="boxed", workers=1)
    assert scores.places == ((0, 0), (1, 0), (1, 1), (2, 0))
    assert [verdict.correct for verdict in scores.verdicts] == [False, True, False, False]
    assert scores.verdicts[1].answer == "7"
    assert scores.summary["n"] == 3 and scores.summary["reasons"]["no_reference"] == 1


@pytest.mark.parametrize(("rows", "settings", "message"), CASES["from_python"])
def test_bad_input_from_python_is_named(rows, settings, message):
    with pytest.raises(UserError, match=message):
        igrpo_nemo.score(*rows, **settings)


def test_overrides_that_are_no_list_are_named():
    with pytest.raises(UserError, match=r"load_config\(\['experiment=demo'\]\)"):
        igrpo_nemo.load_config("experiment=demo")

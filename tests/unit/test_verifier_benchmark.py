"""The verifier's benchmark says what its file must hold, and reads such a file."""

import json
import sys

import pytest
import verifier


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The benchmark, with a folder of data sets that holds nothing of its own."""
    monkeypatch.setenv("IGRPO_DATA_DIR", str(tmp_path))

    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["verifier.py", *words])
        verifier.main()

    return run


def test_without_a_file_it_says_which_it_wants(run, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "give a FILE" in line and "answer, code (list of completions), score" in line
    assert str(tmp_path) not in line


def test_a_file_of_these_columns_is_measured(run, tmp_path, capsys):
    row = {"answer": "2", "code": ["so \\boxed{2}", "\\boxed{3}"], "score": [True, False]}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n")
    run(str(tmp_path / "mine.jsonl"), "--workers", "1", "--json")
    result = json.loads(capsys.readouterr().out)
    assert (result["completions"], result["agreement"]) == (2, 1.0)

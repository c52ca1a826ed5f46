"""`igrpo data inspect`: the table of a data set."""

import argparse
import json

import pytest

from igrpo_nemo.cli import data as inspect
from igrpo_nemo.errors import UserError


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("IGRPO_DATA_DIR", str(tmp_path))
    path = tmp_path / "set.jsonl"
    rows = [{"problem": f"Add {i}\x1b[31m and 1", "answer": str(i + 1)} for i in range(9)]
    rows += [{"problem": "no answer", "answer": ""}, rows[0]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _run(capsys, *words):
    parser = argparse.ArgumentParser()
    inspect.COMMAND.add_flags(parser)
    flags, rest = parser.parse_known_args(words)
    assert inspect.run(flags, rest) == 0
    return capsys.readouterr().out


def test_the_table_has_rows_drops_lengths_duplicates_and_three_samples(path, capsys):
    out = _run(capsys, "inspect", path)
    cells = [line.split() for line in out.splitlines()]
    for line in (
        ["rows", "11"],
        ["kept", "10"],
        ["dropped:", "no_answer", "1"],
        ["no_answer:", "rows", "9"],
        ["repeated", "questions", "1"],
        ["shared", "with", "math500", "not", "at", "hand"],
        ["median", "16"],
    ):
        assert line in cells
    assert out.count("    Q: ") == 3 and "\x1b" not in out


def test_lengths_are_in_tokens_where_a_tokenizer_is_given(path, capsys, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    folder = str(tmp_path / "tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    found = json.loads(_run(capsys, "inspect", path, "--tokenizer", folder, "--json"))
    assert found["unit"] == f"tokens of {folder}"
    assert found["lengths"]["max"] == len(["Add", "1", "\x1b[", "31m", "and", "1"])
    assert found["report"]["kept"] == 10


def test_what_is_missing_is_told(path):
    parser = argparse.ArgumentParser()
    inspect.COMMAND.add_flags(parser)
    for words in ([], ["inspect"], [path], ["inspect", path, path]):
        with pytest.raises(UserError, match="igrpo data inspect NAME"):
            inspect.run(parser.parse_args([]), words)
    with pytest.raises(UserError, match="cannot load the tokenizer /nowhere"):
        inspect.run(parser.parse_args(["--tokenizer", "/nowhere"]), ["inspect", path])


def test_quantiles_are_nearest_ranks():
    assert inspect.quantiles([3, 1, 2]) == {"min": 1, "median": 2, "p95": 3, "p99": 3, "max": 3}

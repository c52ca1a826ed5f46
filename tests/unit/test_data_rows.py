"""Reading rows: every format, and every way in which a file can be bad."""

import json

import pytest
from cases import cases

from igrpo_nemo.data import DataSpec, load_problems
from igrpo_nemo.data.rows import read_rows
from igrpo_nemo.errors import UserError

CASES = cases(__file__)


ROWS = [{"problem": "1+1", "answer": "2"}, {"problem": "1+2", "answer": "3"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def _parquet(path, rows=ROWS):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_every_format_gives_the_same_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES + "\n")
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfproblem,answer\n1+1,2\n1+2,3\n")
    _parquet(tmp_path / "a.parquet")
    for suffix in ("jsonl", "json", "csv", "parquet"):
        assert read_rows(str(tmp_path / f"a.{suffix}")) == ROWS


CHAT = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+1"}]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"prompt": CHAT, "reward_model": {"ground_truth": "2", "style": "rule"}}, {}),
        ({"prompt": CHAT, "answer": ["2"]}, {}),
        ({"messages": CHAT[1:], "target": {"value": 2}}, {}),
        (
            {"id": 1, "info": {"q": "1+1", "a": 2.0}},
            {"input_key": "info.q", "output_key": "info.a"},
        ),
    ],
)
def test_nested_rows_are_read(tmp_path, suffix, row, keys):
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        _parquet(path, [{**row, "generations": [{"text": "long"}]}])
    else:
        path.write_text(json.dumps(row))
    (problem,) = load_problems(DataSpec(data_path=str(path), **keys))
    assert (problem.question, problem.answer) == ("1+1", "2")


def test_only_the_columns_that_are_asked_for_are_read(tmp_path):
    _parquet(tmp_path / "a.parquet", [{**ROWS[0], "generations": ["long"]}])
    assert read_rows(str(tmp_path / "a.parquet"), lambda names: names[:1]) == [{"problem": "1+1"}]


def test_a_folder_has_splits(tmp_path):
    (tmp_path / "test.jsonl").write_text(LINES)
    (tmp_path / "data").mkdir()
    _parquet(tmp_path / "data" / "train-00000-of-00002.parquet")
    _parquet(tmp_path / "data" / "train-00001-of-00002.parquet")
    assert len(read_rows(str(tmp_path))) == 4
    assert read_rows(str(tmp_path), split="test") == ROWS
    with pytest.raises(UserError, match="has no split 'dev': it has test, train"):
        read_rows(str(tmp_path), split="dev")


DEEP = ("a.jsonl", "[" * 100_000 + "\n", "line 1: not JSON")


@pytest.mark.parametrize(("name", "content", "message"), [*CASES["bad_files"], DEEP])
def test_bad_files_are_named_with_the_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message) as caught:
        read_rows(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("keys", "message"), CASES["missing"])
def test_what_is_missing_is_told(tmp_path, monkeypatch, keys, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text(LINES)
    _parquet(tmp_path / "b.parquet", [{"x": 1, "y": [2]}])
    with pytest.raises(UserError, match=message):
        load_problems(DataSpec(**keys))


def test_a_hub_that_fails_is_one_line(monkeypatch):
    import datasets

    def fail(*_, **__):
        raise ValueError("Unknown split \"dev\". Should be one of ['train'].\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match='owner/name, split dev: Unknown split "dev"') as caught:
        load_problems(DataSpec("owner/name", split="dev"))
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("IGRPO_DATA_DIR", "/nowhere")
    with pytest.raises(UserError, match="or put gsm8k_train.jsonl into the folder IGRPO_DATA_DIR"):
        load_problems(DataSpec("gsm8k"))


def test_hub_rows_are_read_with_the_named_columns(monkeypatch, tmp_path):
    import datasets

    asked = []

    def load(name, subset, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setenv("IGRPO_DATA_DIR", str(tmp_path))
    problems = load_problems(DataSpec("nvidia/AceReason-Math"))
    assert [(p.id, p.question, p.answer) for p in problems] == [
        ("acereason_math/0", "1+1", "2"),
        ("acereason_math/1", "1+2", "3"),
    ]
    load_problems(DataSpec("openr1_math"))
    load_problems(DataSpec("gsm8k", input_key="problem", split="test"))
    load_problems(DataSpec("some/other", subset="s"))
    assert asked == [
        ("nvidia/AceReason-Math", None, "train"),
        ("open-r1/OpenR1-Math-220k", "default", "train"),
        ("openai/gsm8k", "main", "test"),
        ("some/other", "s", "train"),
    ]

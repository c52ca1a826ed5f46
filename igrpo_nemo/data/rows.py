"""Rows of a data set, from a file, a folder of splits, or the Hugging Face hub.

    FILE.jsonl / .json / .parquet / .csv | FOLDER/{split}.* | owner/name --read_rows--> dicts

Every failure is a UserError that names the file and, where there is one, the line. Of Parquet files
and of the hub only the columns that are asked for are read: others may be whole generations.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from igrpo_nemo.errors import UserError

Row = dict[str, Any]
Columns = Callable[[Sequence[str]], Collection[str]]
"""From the names of all columns, those that are wanted."""
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


def read_rows(
    source: str, columns: Columns = list, *, subset: str | None = None, split: str | None = None
) -> list[Row]:
    """All rows of `source` in their order.

    A path (it exists, has a known suffix, or starts like one) is read as a file or folder,
    anything of the form `owner/name` from the hub. Raises UserError for a missing file or split,
    an unreadable line (with its number), an unknown format, or no rows at all.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return [row for file in split_files(path, split) for row in read_file(file, columns)]
    if path.exists() or path.suffix in SUFFIXES or source.startswith((".", "/", "~")):
        if split not in (None, "train"):
            raise UserError(
                f"{path} is a single file and has no split {split!r}: leave the split out, or give "
                f"a folder with {split}.jsonl"
            )
        return read_file(path, columns)
    rows = read_hub(source, columns, subset, split or "train")
    if not rows:
        raise UserError(f"{source} has no rows")
    return rows


def split_files(folder: Path, split: str | None) -> list[Path]:
    """The files of a split in a folder: `test.jsonl`, `test-00000-of-00002.parquet`, ..."""
    name = split or "train"
    places = [folder, folder / "data"]
    files = [f for place in places if place.is_dir() for f in sorted(place.iterdir())]
    files = [file for file in files if file.suffix in SUFFIXES]
    chosen = [file for file in files if file.stem == name or file.name.startswith(f"{name}-")]
    if not chosen:
        have = ", ".join(sorted({file.stem.split("-")[0] for file in files})) or "no data files"
        raise UserError(f"{folder} has no split {name!r}: it has {have}")
    return chosen


def read_file(path: Path, columns: Columns = list) -> list[Row]:
    """The rows of one file. Raises UserError as `read_rows` does."""
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        ".jsonl": _jsonl,
        ".json": _json,
        ".parquet": lambda path: _parquet(path, columns),
        ".csv": _csv,
    }
    if path.suffix not in readers:
        raise UserError(f"{path}: unknown format {path.suffix!r}: known are {', '.join(readers)}")
    try:
        rows = list(readers[path.suffix](path))
    except FileNotFoundError:
        raise UserError(f"{path} is not there") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if not rows:
        raise UserError(f"{path} is empty: it has no rows")
    return rows


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _object(_parse_json(line, f"{path}, line {number}"), f"{path}, line {number}")


def _json(path: Path) -> Iterator[Row]:
    content = _parse_json(path.read_bytes(), str(path))
    if not isinstance(content, list):
        raise UserError(f"{path}: a .json file must hold a list of objects (or use .jsonl)")
    for number, row in enumerate(content):
        yield _object(row, f"{path}, item {number}")


def _parse_json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    except RecursionError:
        raise UserError(f"{where}: not JSON (nested too deeply)") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> Row:
    values = dict(pairs)
    if len(values) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{name!r} stands twice in one object")
    return values


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object, not {type(row).__name__}")
    return row


def _csv(path: Path) -> Iterator[Row]:
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(
                        f"{path}, line {reader.line_num}: not as many fields as the header has"
                    )
                yield row
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}") from None


def _parquet(path: Path, columns: Columns) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        wanted = list(columns(names))
        yield from pyarrow.parquet.read_table(path, columns=wanted).to_pylist()
    except pyarrow.ArrowException as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable Parquet file ({message})") from None


def read_hub(name: str, columns: Columns, subset: str | None, split: str) -> list[Row]:
    """The rows of a data set on the Hugging Face hub, or of its local cache."""
    import datasets

    try:
        loaded: Any = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # The boundary to the network and to others' data sets.
        lines = str(error).splitlines()
        what = lines[0] if lines else type(error).__name__
        where = f"{name}{f' ({subset})' if subset else ''}, split {split}"
        raise UserError(f"cannot load the data set {where}: {what}") from None
    rows: Any = loaded.select_columns(list(columns(loaded.column_names)))
    return list(rows)

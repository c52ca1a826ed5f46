"""From rows to problems: named columns, the reference answer, unusable rows dropped and counted.

    rows --question, answer--> problems --usable? duplicate? overlap?--> kept --seeded subset-->

Problem ids are `<set>/<row>`, rows counted from 0 in the file, so they survive every filter.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from igrpo_nemo.by_path import imported
from igrpo_nemo.data.catalog import SOURCES, Source, find_source, locate, source_of_file
from igrpo_nemo.data.columns import (
    ANSWER_KEYS,
    QUESTION_KEYS,
    Unusable,
    question_text,
    reference_answer,
    value_at,
)
from igrpo_nemo.data.golds import check_golds
from igrpo_nemo.data.overlap import repeated, shared_with_evaluation
from igrpo_nemo.data.rows import Row, read_rows
from igrpo_nemo.errors import UserError
from igrpo_nemo.files.display_text import shorten
from igrpo_nemo.rewards.accuracy import Reason
from igrpo_nemo.types import Problem

# `jsonl` and NeMo-RL's own name for "columns of a file" say nothing about which file.
_FILE_NAMES = ("jsonl", "ResponseDataset")
_DROP_REASONS = {
    Reason.NO_ANSWER: "no_answer",
    Reason.NO_REFERENCE: "no_reference",
    Reason.TOO_LONG: "answer_too_long",
    Reason.UNPARSEABLE: "answer_unparseable",
    Reason.MISMATCH: "answer_not_self_equal",
    Reason.TIMEOUT: "answer_timeout",
}
_REMEDIES = {
    "no_question": "input_key names the column of the question",
    "question_not_one_message": "a chat must be one user message, with a system message at most",
    "question_not_text": "the parts of a message must be text",
    "no_answer": "output_key names the column of the answer",
    "several_answers": "write the one answer as a text",
    "answer_not_text": "output_key=COLUMN.FIELD leads into an object",
    "not_unicode": "question and answer must be UTF-8, without lone surrogates",
}
"""What helps where a whole set is unusable, by the reason that most of its rows have."""
_ROWS_NAMED = 20
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True)
class DataSpec:
    """One set of problems, with NeMo-RL's keys of `data.train`.

    `num_problems` takes that many of the usable problems, chosen by `seed`. `drop_unusable` None
    means: for training sets, not for evaluation sets.
    """

    dataset_name: str | None = None
    data_path: str | None = None
    input_key: str | None = None
    output_key: str | None = None
    subset: str | None = None
    split: str | None = None
    num_problems: int | None = None
    seed: int | None = None
    drop_unusable: bool | None = None
    drop_duplicates: bool = False
    drop_overlap: bool = False


@dataclass(frozen=True, slots=True)
class DataReport:
    """What became of the rows. `dropped_rows` names the first few by number, counted from 0.

    `overlap` counts the problems shared with each evaluation set; None where that set is not at
    hand, and for the set itself.
    """

    name: str
    source: str
    rows: int
    kept: int
    dropped: Mapping[str, int]
    dropped_rows: Mapping[str, tuple[int, ...]]
    duplicates: int
    overlap: Mapping[str, int | None] = field(default_factory=dict)

    @property
    def loss(self) -> str | None:
        """One line of what was left out, by reason; None where nothing was."""
        if not self.dropped:
            return None
        count = sum(self.dropped.values())
        return f"{self.source}: {count:,} of {self.rows:,} rows are left out: {_told(self.dropped)}"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a set's rows lie: a path, or a hub id with configuration and split."""

    name: str
    path_or_id: str
    subset: str | None
    split: str | None
    source: Source | None


def load_problems(spec: Any) -> list[Problem]:
    """The problems of a `DataSpec` (or a config section like it); see `load_with_report`."""
    return load_with_report(spec)[0]


def load_with_report(
    spec: Any, *, overlap: bool = False, columns: bool = False
) -> tuple[list[Problem], DataReport]:
    """The problems and what became of the rows; `overlap` also compares with evaluation sets, and
    `columns` keeps the rows' other columns.

    Raises UserError for a missing file, column or split, a broken line, no usable row, or a subset
    larger than what is usable.
    """
    known = (each.name for each in fields(DataSpec))
    spec = DataSpec(**{name: getattr(spec, name) for name in known if hasattr(spec, name)})
    place = _place(spec)
    problems, reasons = _problems(spec, place, columns)
    questions = [problem.question for problem in problems]
    duplicate = repeated(questions)
    if spec.drop_duplicates:
        _mark(reasons, duplicate, "duplicate")
    counts: dict[str, int | None] = {}
    if overlap or spec.drop_overlap:
        counts, shared = shared_with_evaluation(questions, place.source)
        if spec.drop_overlap:
            _mark(reasons, shared, "overlap")
    rows: dict[str | None, list[int]] = {None: []}
    for number, reason in enumerate(reasons):
        rows.setdefault(reason, []).append(number)
    kept = [problems[number] for number in rows.pop(None)]
    dropped = {reason: len(rows[reason]) for reason in sorted(filter(None, rows))}
    if not kept:
        remedy = _REMEDIES.get(max(dropped, key=lambda reason: dropped[reason]))
        raise UserError(
            f"{place.path_or_id}: none of {len(problems)} rows is usable ({_told(dropped)})"
            + (f": {remedy}" if remedy else "")
        )
    if spec.num_problems is not None:
        kept = _subset(kept, spec.num_problems, spec.seed or 0, place.path_or_id)
    report = DataReport(
        name=place.name,
        source=place.path_or_id,
        rows=len(problems),
        kept=len(kept),
        dropped=dropped,
        dropped_rows={reason: tuple(rows[reason][:_ROWS_NAMED]) for reason in dropped},
        duplicates=sum(duplicate),
        overlap=counts,
    )
    return kept, report


def _place(spec: DataSpec) -> _Place:
    name = None if spec.dataset_name in _FILE_NAMES else spec.dataset_name
    source = find_source(name) if name else None
    if spec.data_path:
        source = source or source_of_file(spec.data_path)
        label = name or Path(spec.data_path).stem
        return _Place(label, spec.data_path, spec.subset, spec.split, source)
    if not name:
        raise UserError("data: give a dataset_name or a data_path")
    if _FUNCTION.fullmatch(name):
        return _Place(name.rpartition(":")[2], name, spec.subset, spec.split, None)
    if source is None:
        if "/" not in name and "." not in name:
            raise UserError(
                f"unknown data set {name!r}: known are {', '.join(SOURCES)}, a file, a hub id such "
                "as owner/name, or a function of your own, module:name"
            )
        return _Place(Path(name).stem, name, spec.subset, spec.split, source_of_file(name))
    split = spec.split or source.default_split
    if path := locate(source, split):
        return _Place(source.name, str(path), None, None, source)
    return _Place(source.name, source.hub, spec.subset or source.subset, split, source)


def _problems(
    spec: DataSpec, place: _Place, others: bool
) -> tuple[list[Problem], list[str | None]]:
    """All problems, and why each is dropped, or None; `others`: with their other columns."""

    def columns(names: Sequence[str]) -> list[str]:
        return [_column(key, names) for key in _keys(spec, place, names)]

    rows = _rows(place, list if others else columns)
    question_key, answer_key = _keys(spec, place, list(rows[0]))
    problems: list[Problem] = []
    reasons: list[str | None] = []
    for number, row in enumerate(rows):
        question, no_question = _read(row, question_key)
        answer, no_answer = _read(row, answer_key, answer=True)
        rest = {name: row[name] for name in row if name not in (question_key, answer_key)}
        kept = json.dumps(rest, default=str) if others else ""
        problems.append(Problem(f"{place.name}/{number}", question, answer, kept))
        reasons.append(no_question or no_answer)
    source = place.source
    whole = source is not None and (source.evaluation or spec.split == "test")
    if not (spec.drop_unusable if spec.drop_unusable is not None else not whole):
        return problems, [None] * len(problems)
    answers = [p.answer for p, reason in zip(problems, reasons, strict=True) if reason is None]
    verdicts = iter(check_golds(answers))
    return problems, [reason or _DROP_REASONS.get(next(verdicts)) for reason in reasons]


def _rows(place: _Place, columns: Any) -> list[Row]:
    if _FUNCTION.fullmatch(place.path_or_id):
        return _own_rows(place)
    try:
        return read_rows(place.path_or_id, columns, subset=place.subset, split=place.split)
    except UserError as error:
        if place.source is None or place.path_or_id != place.source.hub:
            raise
        files = " or ".join(place.source.splits[place.split or ""])
        raise UserError(f"{error}; or put {files} into the folder IGRPO_DATA_DIR") from None


def _own_rows(place: _Place) -> list[Row]:
    """The rows of a function of the user's, `module:name`: it is given the split, or None."""
    path = place.path_or_id
    try:
        rows = list(imported(path)(place.split))
    except UserError as error:
        raise UserError(f"the data set {path} {error}") from error
    except Exception as error:  # boundary: the function is the user's
        reason = shorten(f"{type(error).__name__}: {error}", 200)
        raise UserError(f"the data set {path} failed: {reason}") from error
    wrong = next((row for row in rows if not isinstance(row, Mapping)), None)
    if not rows or wrong is not None:
        gave = "no rows" if not rows else f"a row that is no dict but a {type(wrong).__name__}"
        raise UserError(f"the data set {path} gave {gave}")
    return [dict(row) for row in rows]


def _keys(spec: DataSpec, place: _Place, names: Sequence[str]) -> tuple[str, str]:
    """The columns of question and answer: as asked, as the named set has them, or as usual."""
    source = place.source
    own = (source.question_key, source.answer_key) if source else (None, None)
    found = []
    for asked, known, usual, config_key in (
        (spec.input_key, own[0], QUESTION_KEYS, "input_key"),
        (spec.output_key, own[1], ANSWER_KEYS, "output_key"),
    ):
        candidates = [asked] if asked else [*([known] if known else []), *usual]
        key = next((key for key in candidates if _column(key, names) in names), None)
        if key is None:
            lacking = f"no column {asked!r}"
            if not asked:
                lacking = f"none of the columns {', '.join(dict.fromkeys(candidates))}"
            raise UserError(
                f"{place.path_or_id}, row 0: {lacking}: the columns are {', '.join(names)}"
                + ("" if asked else f"; name the right one with {config_key}")
            )
        found.append(key)
    return found[0], found[1]


def _column(key: str, names: Sequence[str]) -> str:
    """The column that a key, which may lead into an object, begins with."""
    return key if key in names else key.partition(".")[0]


def _read(row: Row, key: str, *, answer: bool = False) -> tuple[str, str | None]:
    """The text of a column, empty where there is none, and then why."""
    value = value_at(row, key)
    try:
        if answer:
            return reference_answer(value, solution=key == "solution"), None
        return question_text(value), None
    except Unusable as unusable:
        return "", unusable.reason


def _told(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())


def _mark(reasons: list[str | None], flags: Sequence[bool], reason: str) -> None:
    """Gives the flagged ones a reason that have none yet."""
    for number, flag in enumerate(flags):
        if flag and reasons[number] is None:
            reasons[number] = reason


def _subset(problems: list[Problem], size: int, seed: int, where: str) -> list[Problem]:
    """Exactly `size` problems, chosen by the seed, in the order of the rows."""
    if size > len(problems):
        raise UserError(
            f"{where}: {size} problems were asked for (num_problems), and {len(problems)} are "
            "usable"
        )
    chosen = random.Random(f"{seed}/subset").sample(range(len(problems)), size)
    return [problems[index] for index in sorted(chosen)]

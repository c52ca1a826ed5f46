r"""From rows to problems: named columns, the reference answer, unusable rows dropped and counted.

    rows --question, answer--> problems --usable? duplicate? overlap?--> kept --seeded subset-->

The answer of a row is the last `\boxed{}` of a solution, what stands behind `####`, or the text.
Problem ids are `<set>/<row>`, rows counted from 0 in the file, so they survive every filter.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from igrpo_nemo.data.catalog import (
    ANSWER_KEYS,
    QUESTION_KEYS,
    SOURCES,
    Source,
    default_split,
    find_source,
    locate,
    source_of_file,
)
from igrpo_nemo.data.golds import check_golds
from igrpo_nemo.data.overlap import evaluation_questions, repeated, shared_with
from igrpo_nemo.data.rows import Row, read_rows
from igrpo_nemo.errors import UserError
from igrpo_nemo.rewards.accuracy import Reason
from igrpo_nemo.rewards.extract import extract_answer
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
_ROWS_NAMED = 20
_HAS_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")


@dataclass(frozen=True, slots=True)
class DataSpec:
    """One set of problems, with NeMo-RL's keys of `data.train`.

    `subset_size` (or `num_problems`) takes that many of the usable problems, chosen by `seed`.
    `drop_unusable` None means: for training sets, not for evaluation sets.
    """

    dataset_name: str | None = None
    data_path: str | None = None
    input_key: str | None = None
    output_key: str | None = None
    subset: str | None = None
    split: str | None = None
    subset_size: int | None = None
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


@dataclass(frozen=True, slots=True)
class _Located:
    name: str
    rows: list[Row]
    where: str
    source: Source | None


def spec_of(spec: Any) -> DataSpec:
    """A DataSpec from one, from a mapping, or from any object with its attributes (a config)."""
    if isinstance(spec, DataSpec):
        return spec
    names = [f.name for f in fields(DataSpec)]
    if isinstance(spec, str):
        return DataSpec(dataset_name=spec)
    if isinstance(spec, Mapping):
        values = {name: spec[name] for name in names if name in spec}
    else:
        values = {name: getattr(spec, name) for name in names if hasattr(spec, name)}
    return DataSpec(**values)


def load_problems(spec: Any) -> list[Problem]:
    """The problems of a DataSpec (or config section, mapping, name). See `load_with_report`."""
    return load_with_report(spec)[0]


def load_with_report(spec: Any, *, overlap: bool = False) -> tuple[list[Problem], DataReport]:
    """The problems and what became of the rows; `overlap` also compares with evaluation sets.

    Raises UserError for a missing file, column or split, a broken line, no usable row, or a subset
    larger than what is usable.
    """
    spec = spec_of(spec)
    located = _locate_rows(spec)
    question_key, answer_key = _columns(spec, located)
    problems = [
        Problem(f"{located.name}/{number}", *_question_and_answer(row, question_key, answer_key))
        for number, row in enumerate(located.rows)
    ]
    reasons = _unusable(problems, spec, located.source)
    questions = [problem.question for problem in problems]
    duplicate = repeated(questions)
    if spec.drop_duplicates:
        reasons = [
            r or ("duplicate" if d else None) for r, d in zip(reasons, duplicate, strict=True)
        ]
    counts: dict[str, int | None] = {}
    if overlap or spec.drop_overlap:
        counts, flags = _overlap(questions, located.source)
        if spec.drop_overlap:
            reasons = _mark(reasons, flags, "overlap")
    kept = [problem for problem, reason in zip(problems, reasons, strict=True) if reason is None]
    if not kept:
        why = ", ".join(f"{n} {reason}" for reason, n in Counter(filter(None, reasons)).items())
        raise UserError(f"{located.where}: none of {len(problems)} rows is usable ({why})")
    kept = _take(kept, spec, located.where)
    report = DataReport(
        name=located.name,
        source=located.where,
        rows=len(problems),
        kept=len(kept),
        dropped=dict(sorted(Counter(filter(None, reasons)).items())),
        dropped_rows=_rows_by_reason(reasons),
        duplicates=sum(duplicate),
        overlap=counts,
    )
    return kept, report


def _locate_rows(spec: DataSpec) -> _Located:
    name = spec.dataset_name
    source = find_source(name) if name else None
    if spec.data_path:
        label = name if name and name not in _FILE_NAMES else Path(spec.data_path).stem
        rows = read_rows(spec.data_path, subset=spec.subset, split=spec.split)
        return _Located(label, rows, spec.data_path, source or source_of_file(spec.data_path))
    if not name or name in _FILE_NAMES:
        raise UserError("data: give a dataset_name or a data_path")
    if source is None:
        if "/" not in name and "." not in name:
            raise UserError(
                f"unknown data set {name!r}: known are {', '.join(SOURCES)}, a file, or a hub id "
                "such as owner/name"
            )
        rows = read_rows(name, subset=spec.subset, split=spec.split)
        return _Located(Path(name).stem, rows, name, source_of_file(name))
    split = spec.split or default_split(source)
    path = locate(source, split)
    if path is not None:
        return _Located(source.name, read_rows(str(path)), str(path), source)
    if source.hub is None:
        raise UserError(f"the data set {source.name} is not in a local folder (IGRPO_DATA_DIR)")
    hub_split = source.hub_splits.get(split, split)
    rows = read_rows(source.hub, subset=spec.subset or source.subset, split=hub_split)
    return _Located(source.name, rows, f"{source.hub}, split {hub_split}", source)


def _columns(spec: DataSpec, located: _Located) -> tuple[str, str]:
    """The columns of question and answer: as asked, as the named set has them, or as usual."""
    source = located.source
    own_question, own_answer = (source.question_key, source.answer_key) if source else (None, None)
    return (
        _column(located, spec.input_key, own_question, QUESTION_KEYS, "input_key"),
        _column(located, spec.output_key, own_answer, ANSWER_KEYS, "output_key"),
    )


def _column(
    located: _Located, asked: str | None, own: str | None, usual: Sequence[str], config_key: str
) -> str:
    candidates = [asked] if asked else [*([own] if own else []), *usual]
    first = located.rows[0]
    for key in candidates:
        if key in first:
            return key
    have = ", ".join(map(str, first))
    if asked:
        raise UserError(f"{located.where}, row 0: no column {asked!r}: the columns are {have}")
    raise UserError(
        f"{located.where}, row 0: none of the columns {', '.join(dict.fromkeys(candidates))}: "
        f"the columns are {have}; name the right one with {config_key}"
    )


def _question_and_answer(row: Row, question_key: str, answer_key: str) -> tuple[str, str]:
    question = row.get(question_key)
    answer = reference_answer(row.get(answer_key), solution=answer_key == "solution")
    return (question.strip() if isinstance(question, str) else "", answer)


def reference_answer(value: Any, *, solution: bool = False) -> str:
    r"""The reference answer in a column's value; empty where there is none.

    A float that is a whole number loses its `.0`. A text is cut to its last `<answer>`, its last
    `\boxed{}`, or to what follows the last `####`; a `solution` without any has no answer.
    """
    if value is None or isinstance(value, bool):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list) and len(value) == 1:
        return reference_answer(value[0], solution=solution)
    text = str(value).strip()
    marked = extract_answer(text)
    if marked is not None:
        return marked
    if _HAS_BOX.search(text):
        return ""  # An empty box, or one that never closes.
    if "####" in text:
        return text.rpartition("####")[2].strip()
    return "" if solution else text


def _unusable(
    problems: Sequence[Problem], spec: DataSpec, source: Source | None
) -> list[str | None]:
    """Per problem why it is dropped, or None."""
    evaluation = source is not None and (source.evaluation or spec.split == "test")
    drop = spec.drop_unusable if spec.drop_unusable is not None else not evaluation
    if not drop:
        return [None] * len(problems)
    verdicts = check_golds([problem.answer for problem in problems])
    return [
        "no_question" if not problem.question else _DROP_REASONS.get(verdict)
        for problem, verdict in zip(problems, verdicts, strict=True)
    ]


def _mark(reasons: list[str | None], flags: Sequence[bool], reason: str) -> list[str | None]:
    return [old or (reason if flag else None) for old, flag in zip(reasons, flags, strict=True)]


def _overlap(
    questions: Sequence[str], source: Source | None
) -> tuple[dict[str, int | None], list[bool]]:
    """Shared problems per evaluation set, and for each question whether any set has it."""
    counts: dict[str, int | None] = {}
    shared = [False] * len(questions)
    for name, others in evaluation_questions().items():
        if others is None or (source is not None and source.name == name):
            counts[name] = None
            continue
        flags = shared_with(questions, others)
        counts[name] = sum(flags)
        shared = [a or b for a, b in zip(shared, flags, strict=True)]
    return counts, shared


def _take(problems: list[Problem], spec: DataSpec, where: str) -> list[Problem]:
    """Exactly `subset_size` problems, chosen by the seed, in the order of the rows."""
    size = spec.subset_size if spec.subset_size is not None else spec.num_problems
    if size is None:
        return problems
    if size > len(problems):
        raise UserError(
            f"{where}: {size} problems were asked for (subset_size), and {len(problems)} are usable"
        )
    chosen = random.Random(f"{spec.seed or 0}/subset").sample(range(len(problems)), size)
    return [problems[index] for index in sorted(chosen)]


def _rows_by_reason(reasons: Sequence[str | None]) -> dict[str, tuple[int, ...]]:
    rows: dict[str, list[int]] = {}
    for number, reason in enumerate(reasons):
        if reason is not None:
            rows.setdefault(reason, []).append(number)
    return {reason: tuple(numbers[:_ROWS_NAMED]) for reason, numbers in sorted(rows.items())}

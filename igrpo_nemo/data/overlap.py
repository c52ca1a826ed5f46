"""Duplicates within a data set, and problems it shares with the evaluation sets.

Two questions are the same when their letters, digits and operators are, whatever the spacing,
case, punctuation and LaTeX spelling.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from igrpo_nemo.data.catalog import EVALUATION_SETS, SOURCES, locate
from igrpo_nemo.data.rows import read_file

_SPELLING = re.compile(r"^\s*subproblem \d+:|\\(?:[dt]?frac|left|right|text|mathrm)")
# Operators and decimal points stay: they are what the problem asks.
_PUNCTUATION = re.compile(r"[\s{}$;:?'\"\\~&]+|(?<!\d)[.,]|[.,](?!\d)")


def fingerprint(question: str) -> str:
    """What two spellings of one question have in common."""
    return _PUNCTUATION.sub("", _SPELLING.sub("", question.lower()))


def repeated(questions: Sequence[str]) -> list[bool]:
    """For each question whether an earlier one is the same."""
    seen: set[str] = set()
    flags = []
    for question in questions:
        mark = fingerprint(question)
        flags.append(mark in seen)
        seen.add(mark)
    return flags


def shared_with(questions: Sequence[str], others: Iterable[str]) -> list[bool]:
    """For each question whether it is also among `others`."""
    marks = {fingerprint(question) for question in others}
    return [fingerprint(question) in marks for question in questions]


def evaluation_questions() -> dict[str, list[str] | None]:
    """The questions of each evaluation set that lies in a local folder; None for one that doesn't.

    The hub is not asked: a report must not need a network.
    """
    found: dict[str, list[str] | None] = {}
    for name in EVALUATION_SETS:
        source = SOURCES[name]
        path = locate(source, "test")
        if path is None:
            found[name] = None
        else:
            found[name] = [str(row.get(source.question_key) or "") for row in read_file(path)]
    return found

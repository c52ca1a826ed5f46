"""Duplicates within a data set, and problems it shares with the evaluation sets.

Two questions are the same when their letters, digits and operators are, whatever the spacing,
case, punctuation and LaTeX spelling.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from igrpo_nemo.data.catalog import EVALUATION_SETS, SOURCES, Source, locate
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


def shared_with_evaluation(
    questions: Sequence[str], own: Source | None
) -> tuple[dict[str, int | None], list[bool]]:
    """Shared questions by evaluation set, and for each question whether any set has it.

    None for a set that does not lie in the local folder, and for `own`, the questions' set. The hub
    is not asked: a report must not need a network.
    """
    marks = [fingerprint(question) for question in questions]
    counts: dict[str, int | None] = {}
    shared = [False] * len(marks)
    for name in EVALUATION_SETS:
        source = SOURCES[name]
        path = None if source is own else locate(source, "test")
        counts[name] = None
        if path is None:
            continue
        others = {fingerprint(str(row.get(source.question_key) or "")) for row in read_file(path)}
        flags = [mark in others for mark in marks]
        counts[name] = sum(flags)
        shared = [a or b for a, b in zip(shared, flags, strict=True)]
    return counts, shared

"""Which problems can serve: no question twice, none of an evaluation set, references that verify.

Two questions are the same when their letters, digits and operators are, whatever the spacing,
case, punctuation and LaTeX spelling. A reference that the verifier cannot read, or that does not
equal itself, would be a silent constant reward: the check costs seconds per thousand formulas, so
it is made in the pool and its outcome kept on disk under the digest of the references.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from igrpo_nemo.data.catalog import EVALUATION_SETS, SOURCES, Source, locate
from igrpo_nemo.data.rows import read_file
from igrpo_nemo.errors import UserError
from igrpo_nemo.files import cache_folder
from igrpo_nemo.files.atomic import write_or_refuse
from igrpo_nemo.rewards.accuracy import Reason, gold_verdict
from igrpo_nemo.rewards.literal import read_literal

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


# Counts up when the reading of references changes, so that old outcomes are not used.
_CHECK_VERSION = 4
_ITEM_LIMIT_S = 10.0


def check_golds(golds: Sequence[str]) -> list[Reason]:
    """`gold_verdict` of each reference, in order. Plain numbers never leave this process."""
    verdicts: dict[str, Reason] = {}
    formulas: list[str] = []
    for gold in dict.fromkeys(golds):
        if not gold.strip() or read_literal(gold.strip()) is not None:
            verdicts[gold] = gold_verdict(gold)
        else:
            formulas.append(gold)
    verdicts.update(_check_formulas(formulas))
    return [verdicts[gold] for gold in golds]


def _check_formulas(formulas: list[str]) -> dict[str, Reason]:
    if not formulas:
        return {}
    from igrpo_nemo.rewards.pool import VerifierPool

    digest = hashlib.sha256(json.dumps([_CHECK_VERSION, *formulas]).encode()).hexdigest()
    path = cache_folder() / "references" / f"{digest[:32]}.json"
    cached = _read(path, len(formulas))
    if cached is None:
        with VerifierPool(
            workers=min(8, os.cpu_count() or 1), item_timeout_s=_ITEM_LIMIT_S
        ) as pool:
            cached = pool.check_golds(formulas)
        if Reason.TIMEOUT not in cached:  # Which may be the machine's fault, and not for ever.
            try:
                write_or_refuse(path, json.dumps([str(reason) for reason in cached]))
            except UserError as error:
                warnings.warn(
                    f"{error}: references are checked again each time (IGRPO_CACHE_DIR names "
                    "another folder)",
                    stacklevel=2,
                )
    return dict(zip(formulas, cached, strict=True))


def _read(path: Path, count: int) -> list[Reason] | None:
    try:
        reasons = [Reason(reason) for reason in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        return None  # No cache, or not ours: check again.
    return reasons if len(reasons) == count else None

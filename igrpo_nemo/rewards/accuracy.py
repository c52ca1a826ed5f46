r"""Whether a completion's answer equals the reference: the verifiable reward's first half.

    completion --extract--> answer --literal, same text--> verdict   (microseconds, most of them)
                               \--read--> value --equal to the reference's?--> verdict

`quick_verdict` is pure, linear and total: it may run in the training process. `full_verdict` uses
SymPy, which can hang or exhaust memory on hostile text: `rewards.pool` runs it in worker processes
with a hard limit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from igrpo_nemo.rewards.extract import AnswerFormat, extract_answer
from igrpo_nemo.rewards.literal import Literal, read_literal, same_number
from igrpo_nemo.rewards.spelling import balanced, canonical, plain
from igrpo_nemo.rewards.units import WORDS


class Reason(StrEnum):
    """Why an accuracy verdict is what it is."""

    MATCH = "match"
    """The answer equals the reference: accuracy 1."""
    MISMATCH = "mismatch"
    """Both were read and they differ."""
    NO_ANSWER = "no_answer"
    """No complete answer outside the thinking."""
    UNPARSEABLE = "unparseable"
    """There is an answer, but no mathematics could be read from it, and its text differs; or it is
    nested deeper than `MOST_DEPTH`."""
    TIMEOUT = "timeout"
    """The comparison met its time or memory limit, or the group's deadline."""
    TOO_LONG = "too_long"
    """The answer (or the reference) is longer than `MOST_CHARS`."""
    NO_REFERENCE = "no_reference"
    """The reference is empty or says that there is none (`NaN`): nothing is equal to it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on one completion. `answer` is the extracted text, None without one."""

    reason: Reason
    answer: str | None = None

    @property
    def correct(self) -> bool:
        return self.reason is Reason.MATCH


MOST_CHARS, MOST_DEPTH = 2_000, 25
"""The longest and the most nested answer that is compared."""

_BRACKET = re.compile(r"[()\[\]{}]")


def warm_up() -> None:
    """A pass through the grammar and the comparisons: SymPy imports its parts on first use."""
    for gold, answer in WORDS["warm_up"]:
        full_verdict(gold, answer)


_NO_REFERENCE = frozenset(WORDS["no_reference"])
# As programs write them; in other spellings (`none`, `\text{None}`) they are answers.
_NULLS = frozenset(("None", "NONE", "null", "NULL", "Null"))
_POINTER = re.compile(
    r"\W*(?:please\s+)?(?:see|refer\s+to|cf\.?|as\s+(?:shown|described|explained)|shown|given)\b.*"
    r"\b(?:figure|fig|above|below|diagram|graph|image|picture|attached|attachment|table|solution|"
    r"explanation|proof|text|appendix|plot|sketch|answer|work|page|book)s?\b.*",
    re.IGNORECASE | re.DOTALL,
)
_WRAPPING = re.compile(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}")


@lru_cache(maxsize=16_384)
def is_missing_reference(text: str) -> bool:
    """Whether a reference says that there is none: empty, NaN, None, N/A, `see figure above`.

    Nothing is ever equal to such a reference: rows with one are dropped and counted.
    """
    bare = text.strip().strip("$").strip()
    if not bare or bare in _NULLS:
        return True
    if len(bare) > 200:
        return False
    bare = _WRAPPING.sub(r"\1", bare).strip(" .\"'`*")
    return not bare or bare.casefold() in _NO_REFERENCE or _POINTER.fullmatch(bare) is not None


def gold_verdict(gold: str) -> Reason:
    """Whether a reference answer can serve as one. May hang: run it in the pool.

    MATCH where mathematics is read from it that equals itself, MISMATCH where it does not,
    NO_ANSWER for an empty one, NO_REFERENCE for `NaN` and the like, TOO_LONG, UNPARSEABLE where
    nothing can be read: it would be a silent constant reward.
    """
    if not gold.strip():
        return Reason.NO_ANSWER
    if is_missing_reference(gold):
        return Reason.NO_REFERENCE
    if len(gold) > MOST_CHARS:
        return Reason.TOO_LONG
    if read_literal(gold.strip()) is not None:
        return Reason.MATCH
    from igrpo_nemo.rewards.read import read
    from igrpo_nemo.rewards.values import Text

    value = read(gold, reference=True)
    if isinstance(value, Text) and not (_has_substance(gold) and balanced(gold)):
        return Reason.UNPARSEABLE
    return full_verdict(gold, gold)


def full_verdict(gold: str, answer: str) -> Reason:
    """The verdict on an extracted answer. May hang: run it in the pool.

    Returns MATCH, MISMATCH, or UNPARSEABLE for an answer that is only a text, and another one.
    """
    from igrpo_nemo.rewards.equal import equal
    from igrpo_nemo.rewards.read import read
    from igrpo_nemo.rewards.values import Text

    try:
        if _same_text(gold, answer):
            return Reason.MATCH
        value = read(answer)
        if equal(read(gold, reference=True), value):
            return Reason.MATCH
    except (RecursionError, MemoryError, ValueError, TypeError, ArithmeticError, AttributeError):
        # The boundary to SymPy: text that breaks it is an answer nobody can read.
        return Reason.UNPARSEABLE
    return Reason.UNPARSEABLE if isinstance(value, Text) else Reason.MISMATCH


def quick_verdict(gold: str, answer: str) -> Reason | None:
    """The verdict where it is certain without a parser; None where the full one must be asked.

    Never contradicts `full_verdict`: it decides between plain numbers, between letters, and that a
    formula equals itself.
    """
    gold_number = _gold_literal(gold)
    if gold_number is not None and (answer_number := read_literal(answer)) is not None:
        same = same_number(gold_number, answer_number)
        if same is not None:
            return Reason.MATCH if same else Reason.MISMATCH
    if len(answer) > 2 * len(gold) + 40:
        return None
    return Reason.MATCH if _same_text(gold, answer) else None


def _same_text(gold: str, answer: str) -> bool:
    """Whether two texts say the same in the same words, whatever they say."""
    text = plain(canonical(gold))
    return _has_substance(text) and plain(canonical(answer)) == text


def _has_substance(text: str) -> bool:
    """Whether anything is left of a text without its commands, such as `\\frac{}{}`."""
    return any(char.isalnum() for char in re.sub(r"\\[a-zA-Z]+", "", text))


@lru_cache(maxsize=16_384)
def _gold_literal(gold: str) -> Literal | None:
    return read_literal(gold.strip(), reference=True)


_GROUPING = re.compile(r"\\!|\{,\}")
_SEVERAL = re.compile(r",(?!\s?\d{3}(?!\d))|;|\b(?:and|or)\b|\\pm")


@lru_cache(maxsize=16_384)
def _has_parts(gold: str) -> bool:
    """Whether a reference lists several things, so that several boxes may answer it."""
    return _SEVERAL.search(_GROUPING.sub("", gold)) is not None


@lru_cache(maxsize=16_384)
def _has_variable(gold: str) -> bool:
    """Whether a letter stands outside of commands and texts."""
    return re.search(r"[A-Za-z]", re.sub(r"\\[a-zA-Z]+(?:\{[^{}]*\})?", "", gold)) is not None


def find_answer(
    gold: str,
    text: str,
    answer_format: AnswerFormat = AnswerFormat.ANY,
    *,
    thinking_open: bool = False,
    truncated: bool = False,
) -> str | Verdict:
    """The extracted answer, or the verdict where there is none that may be compared."""
    if is_missing_reference(gold):
        return Verdict(Reason.NO_REFERENCE)
    answer = extract_answer(
        text,
        answer_format,
        thinking_open=thinking_open,
        truncated=truncated,
        several=_has_parts(gold),
        plain_units=not _has_variable(gold),
    )
    if answer is None:
        return Verdict(Reason.NO_ANSWER)
    if max(len(answer), len(gold)) > MOST_CHARS:
        return Verdict(Reason.TOO_LONG)
    if len(answer) > MOST_DEPTH and _depth(answer) > MOST_DEPTH:
        # The parser's time grows exponentially with the nesting: it would only meet its limit.
        return Verdict(Reason.UNPARSEABLE)
    return answer


def _depth(text: str) -> int:
    """How deep brackets of any kind are nested."""
    deepest = depth = 0
    for bracket in _BRACKET.findall(text):
        depth = depth + 1 if bracket in "([{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def verify_completion(
    gold: str, text: str, answer_format: AnswerFormat = AnswerFormat.ANY, **ending: bool
) -> Verdict:
    """Extract and compare in this process, without a time limit: for trusted text and tests.
    `ending` as in `find_answer`."""
    answer = find_answer(gold, text, answer_format, **ending)
    if isinstance(answer, Verdict):
        return answer
    reason = quick_verdict(gold, answer) or full_verdict(gold, answer)
    return Verdict(reason, answer)

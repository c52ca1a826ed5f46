r"""Plain numbers, read without a parser: the exact fast path of the accuracy reward.

    "1,\!000" "\$6" "\dfrac{3}{50}" "12\frac{3}{5}" "48^\circ" "6\text{ cm}" "25\%" --> Literal
    (gold, answer) --same_number--> True | False | None (None: ask math-verify)

A literal is a text of which math-verify's reading is known in advance; anything else is None. The
rules follow math-verify's own (units, degrees and dollar signs dropped, `9\%` equal to 9, decimals
compared after rounding to `float_rounding` places) and leave every doubtful case to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

# Longer numbers meet SymPy's precision rules and Python's limits; they are rare, so ask.
_MAX_DIGITS = 15
_INTEGER = r"\d{1,15}"
_GROUPED = r"[1-9]\d{0,2}(?:(?:,\\!|\{,\}|,)\d{3}){1,4}"
_LITERAL = re.compile(
    rf"""
    (?P<sign>-?)
    (?:\\?\$(?=[\d.]))?
    (?:
        (?P<grouped>{_GROUPED})
      | (?P<decimal>\d{{0,15}}\.\d{{1,20}})
      | (?P<slash_numerator>{_INTEGER})/(?P<slash_denominator>{_INTEGER})
      | (?P<integer>{_INTEGER})?
        (?:[ ]?\\[dt]?frac\{{(?P<numerator>{_INTEGER})\}}\{{(?P<denominator>{_INTEGER})\}})?
    )
    (?P<suffix>
        \s?\\?%
      | \^\\circ | \^\{{\\circ\}}
      | (?:\\[ ])?\s?\\(?:text|mathrm|mbox)\{{[ a-zA-Z.]{{1,40}}\}}
    )?
    """,
    re.VERBOSE,
)
# The letter of a choice. Not E and I, which may be constants.
_LETTER = re.compile(r"([A-DF-HJ-Z])|\(([A-DF-HJ-Z])\)|\\text\{\(?([A-DF-HJ-Z])\)?\}")
# `$5$`, `\(5\)` and `\[5\]` are read as their content when nothing stands beside them.
_WRAPPED = re.compile(r"\$([^$]+)\$|\\\((.+)\\\)|\\\[(.+)\\\]")
_GROUP_MARKS = str.maketrans("", "", ",\\!{}")


@dataclass(frozen=True, slots=True)
class Literal:
    """A number, or the letter of a choice, as math-verify would read it.

    `exact` tells an integer or fraction from a decimal (which is compared rounded); `percent` that
    a percent sign followed. `digits` counts those of a decimal; a `letter` has
    the value 0.
    """

    value: Fraction
    exact: bool = True
    percent: bool = False
    letter: str = ""
    digits: int = 0

    @property
    def short(self) -> bool:
        """Whether SymPy's 15 digits hold the number as it was written."""
        return self.digits <= _MAX_DIGITS

    @property
    def integer(self) -> bool:
        return self.exact and self.value.denominator == 1


def read_literal(text: str) -> Literal | None:
    """The number that `text` is, or None where only math-verify can tell."""
    if len(text) > 80 or not text.isascii():
        return None
    if text.isdigit() and len(text) <= _MAX_DIGITS:
        return Literal(Fraction(int(text)))
    if (letter := _LETTER.fullmatch(text)) is not None:
        return Literal(Fraction(0), letter=letter[1] or letter[2] or letter[3])
    wrapped = _WRAPPED.fullmatch(text)
    if wrapped is not None:
        text = (wrapped[1] or wrapped[2] or wrapped[3]).strip()
    match = _LITERAL.fullmatch(text)
    if match is None:
        return None
    part = match.groupdict()
    suffix = part["suffix"] or ""
    percent = suffix.endswith("%")
    if wrapped is not None and (suffix or "$" in text):
        return None
    # math-verify drops `\mathrm{th}` by a rule of its own, and reads `1,000^\circ` as a set.
    if "th}" in suffix or (part["grouped"] and "circ" in suffix):
        return None
    value = _magnitude(part)
    if value is None:
        return None
    if part["sign"]:
        if part["integer"] and part["numerator"]:
            return None
        value = -value
    digits = len(part["decimal"] or "")
    return Literal(value, exact=not part["decimal"], percent=percent, digits=digits)


def _magnitude(part: dict[str, str | None]) -> Fraction | None:
    if part["grouped"]:
        return Fraction(int(part["grouped"].translate(_GROUP_MARKS)))
    if part["decimal"]:
        return Fraction(part["decimal"])
    numerator = part["numerator"] or part["slash_numerator"]
    denominator = part["denominator"] or part["slash_denominator"]
    if numerator is None or denominator is None:
        return Fraction(int(part["integer"])) if part["integer"] else None
    if int(denominator) == 0:
        return None
    fraction = Fraction(int(numerator), int(denominator))
    if part["integer"] is None:
        return fraction
    # A mixed number; `3\frac{4}{2}` and `0\frac{1}{2}` are not written by anyone who means one.
    if not 0 < fraction < 1 or int(part["integer"]) == 0:
        return None
    return int(part["integer"]) + fraction


def same_number(gold: Literal, answer: Literal, *, float_rounding: int = 6) -> bool | None:
    """Whether math-verify would call two literals equal; None where only it can tell."""
    if gold.letter or answer.letter:
        return gold.letter == answer.letter
    if gold.percent or answer.percent:
        if gold.integer and answer.integer:
            # math-verify compares integers with the percent sign dropped from either side.
            return gold.value == answer.value
        readings = [(a, b) for a in _percent_readings(gold) for b in _percent_readings(answer)]
        return False if all(_apart(a, b, float_rounding) for a, b in readings) else None
    if gold.exact and answer.exact:
        return gold.value == answer.value
    if gold.value == answer.value and gold.short and answer.short:
        return True
    return False if _apart(gold.value, answer.value, float_rounding) else None


def _percent_readings(number: Literal) -> tuple[Fraction, ...]:
    return (number.value, number.value / 100) if number.percent else (number.value,)


def _apart(a: Fraction, b: Fraction, float_rounding: int) -> bool:
    """Whether two numbers differ however they are rounded: by SymPy's 15 digits, or its places."""
    step = max(Fraction(1, 10**float_rounding), max(abs(a), abs(b)) / 10**12)
    return abs(a - b) > 2 * step

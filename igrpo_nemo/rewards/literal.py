r"""Plain numbers, read without a parser: the exact fast path of the accuracy reward.

    "1,\!000" "\$6" "\dfrac{3}{50}" "12\frac{3}{5}" "48^\circ" "6\text{ cm}" "25\%" --> Literal
    (gold, answer) --same_number--> True | False | None (None: ask the full comparison)

A literal is a text of which the full reading (`rewards.read`) is known in advance; anything else
is None, and so is every doubtful case.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from igrpo_nemo.rewards.units import Unit, read_unit, scales

_DEGREE = read_unit("degree")
_DOLLAR = read_unit("usd")
# Decimals and fractions of more than 15 digits meet SymPy's precision rules and are rare, so ask.
_MAX_DIGITS = 40
"""Of an integer that stands alone: it is compared exactly."""
_INTEGER = r"\d{1,15}"
_GROUPED = r"[1-9]\d{0,2}(?:(?:,\\!|\{,\}|,)\d{3}){1,4}"
_LITERAL = re.compile(
    rf"""
    (?P<sign>-?)
    (?P<dollar>\\?\$(?=[\d.]))?
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
      | (?:\\[ ])?\s?\\(?:text|mathrm|mbox)\{{(?P<words>[ a-zA-Z.]{{1,40}})\}}
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
    """A number, or the letter of a choice.

    `exact` tells an integer or fraction from a decimal (which may be rounded); `percent` that
    a percent sign followed. A `letter` has the value 0.
    """

    value: Fraction
    exact: bool = True
    percent: bool = False
    letter: str = ""
    unit: Unit | None = None


def read_literal(text: str, *, reference: bool = False) -> Literal | None:
    """The number that `text` is, or None where only the full comparison can tell."""
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
    if wrapped is not None and (suffix or "$" in text) or (part["dollar"] and suffix):
        return None
    unit = _DOLLAR if part["dollar"] else _DEGREE if "circ" in suffix else None
    if part["words"] and (unit := read_unit(part["words"].strip(), reference=reference)) is None:
        return None
    value = _magnitude(part)
    if value is None or (unit is not None and (unit.magnitude != 1 or unit.percent)):
        return None
    value = -value if part["sign"] else value
    return Literal(value, not part["decimal"], suffix.endswith("%"), unit=unit)


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


def same_number(gold: Literal, answer: Literal) -> bool | None:
    """Whether two literals are equal; None where only the full comparison can tell."""
    if gold.letter or answer.letter:
        return gold.letter == answer.letter
    a, b = gold.value, answer.value
    if gold.unit is not None and answer.unit is not None:
        factors = scales(gold.unit, answer.unit)
        if factors is None:
            return False
        a, b = a * factors[0], b * factors[1]
    if a == b and gold.percent == answer.percent:
        return True
    if gold.percent != answer.percent:
        if gold.unit is not None or answer.unit is not None:
            return None
        readings = [(a, b), (a / 100, b) if gold.percent else (a, b / 100)]
        if any(x == y for x, y in readings):
            return True
    else:
        readings = [(a, b)]
    if gold.exact and answer.exact:
        return False
    return False if all(_apart(x, y) for x, y in readings) else None


def _apart(a: Fraction, b: Fraction) -> bool:
    """Whether two numbers differ by more than any rounding."""
    return abs(a - b) * 1_000 > max(abs(a), abs(b))

r"""Formulas as SymPy expressions, from LaTeX and ASCII notation.

    "2\pi(R^2-r^2)"  "2*pi*(R**2-r**2)"  --parse_formula--> 2*pi*(R**2 - r**2)

Upper and lower case differ; `e` and `i` are the constants (`i` is an index beside a `j`). What
has two usual readings (`1/2x`, `x2`, words) is refused: `Unreadable`. Integrals, sums, limits and
derivatives go to math-verify's parser. Numbers are exact: `0.1` is 1/10.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import sympy
from sympy import Rational

from igrpo_nemo.rewards.grammar import Parser, Unreadable

_CALCULUS = re.compile(r"\\(?:int|iint|sum|prod|lim|partial|oint)(?![a-z])|\\frac\s*\{d|\{d\}")
_SCIENTIFIC = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+))[eE]([-+]?\d+)")
_REPEATING = re.compile(r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{(\d+)\}|(?<=\.)\((\d+)\))")
_GOES_ON = re.compile(r"(\d*)\.(\d+)\s*(?:\\ldots|\.\.\.+)")


def parse_formula(text: str) -> Any:
    """The SymPy expression that a spelled text is. Raises Unreadable."""
    if _CALCULUS.search(text):
        return _calculus(text)
    if (number := _SCIENTIFIC.fullmatch(text)) is not None:
        if abs(int(number[2])) > 5_000:
            raise Unreadable(text)
        return Rational(number[1]) * Rational(10) ** int(number[2])
    text = _REPEATING.sub(_repeating, text)
    text = _GOES_ON.sub(_going_on, text)
    parser = Parser(text)
    try:
        value = parser.whole()
    except (RecursionError, IndexError, AttributeError, ZeroDivisionError, TypeError) as error:
        raise Unreadable(text) from error
    if value.has(sympy.nan, sympy.zoo):
        raise Unreadable(text)
    return value


def _calculus(text: str) -> Any:
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

    try:
        value: Any = latex2sympy(
            text.replace("*", r"\cdot "),
            is_real=None,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
        return value.doit()
    except Exception as error:  # The boundary to a parser that raises bare exceptions.
        raise Unreadable(text) from error


def _repeating(match: re.Match[str]) -> str:
    """`0.1\\overline{6}` as a fraction."""
    period = match[3] or match[4]
    start = match[2]
    value = Fraction(int((match[1] or "0") + start), 10 ** len(start)) + Fraction(
        int(period), 10 ** len(start) * (10 ** len(period) - 1)
    )
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _going_on(match: re.Match[str]) -> str:
    r"""`0.333\ldots`, where what repeats is written at least twice, and a single digit thrice."""
    digits = match[2]
    for length in range(1, len(digits) // 2 + 1):
        times = max(2, -(-3 // length))
        if len(digits) >= length * times and digits.endswith(digits[-length:] * times):
            start = digits
            while start.endswith(digits[-length:]):
                start = start[:-length]
            if len(start) <= 2:
                return _repeating_of(match[1], start, digits[-length:])
    raise Unreadable(match[0])


def _repeating_of(whole: str, start: str, period: str) -> str:
    found = _REPEATING.fullmatch(f"{whole}.{start}\\overline{{{period}}}")
    assert found is not None
    return _repeating(found)

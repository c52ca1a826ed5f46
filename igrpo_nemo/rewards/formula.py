r"""Formulas as SymPy expressions, from LaTeX and ASCII notation.

    "2\pi(R^2-r^2)"  "2*pi*(R**2-r**2)"  --parse_formula--> 2*pi*(R**2 - r**2)

Upper and lower case differ; `e` and `i` are the constants (`i` is an index beside a `j`). What
has two usual readings (`1/2x`, `x2`, words) is refused: `Unreadable`. Integrals, sums, limits and
derivatives go to math-verify's parser. Numbers are exact: `0.1` is 1/10.

Two formulas are compared exactly where both are exact, relatively where one is a decimal: numbers
as rationals or by 25 and then 400 digits; formulas in variables by their values at unrelated
points, positive ones and ones of both signs, where an identity that holds by accident has no
chance. There is no simplification: it takes ten times as long to fail.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import sympy
from sympy import Integer, Rational
from sympy.core.evalf import PrecisionExhausted

from igrpo_nemo.rewards.grammar import Parser, Unreadable

_CALCULUS = re.compile(r"\\(?:int|iint|sum|prod|lim|partial|oint)(?![a-z])|\\frac\s*\{d|\{d\}")
_SCIENTIFIC = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+))[eE]([-+]?\d+)")
_REPEATING = re.compile(r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{(\d+)\}|(?<=\.)\((\d+)\))")
_GOES_ON = re.compile(r"(\d*)\.(\d+)\s*(?:\\ldots|\.\.\.+)")

_PRIMES = (17, 23, 31, 41, 53, 61, 71, 83, 97, 103, 113, 127)
_STEPS = (sympy.floor, sympy.ceiling)
_SHORT, _LONG = 25, 400


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
                written = f"{match[1]}.{start}\\overline{{{digits[-length:]}}}"
                return _REPEATING.sub(_repeating, written)
    raise Unreadable(match[0])


def same_formula(a: Any, b: Any, tolerance: Any = None) -> bool:
    """Whether two expressions are equal; up to a relative `tolerance` where one is given."""
    if a == b:
        return True
    if a.is_Rational and b.is_Rational:
        return tolerance is not None and abs(a - b) <= tolerance * max(abs(a), abs(b))
    if a.has(sympy.oo, -sympy.oo) or b.has(sympy.oo, -sympy.oo):
        return False
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if not symbols:
        return _same_values(a, b, tolerance)
    if len(symbols) > len(_PRIMES):
        return False
    points = () if _over_integers(a, b) else _points(symbols)
    if not points or a.has(*_STEPS) or b.has(*_STEPS):
        points = (*points, *_integer_points(symbols))
    judged = 0
    for point, any_sign in points:
        left, right = a.xreplace(point), b.xreplace(point)
        x, y = number_at(left), number_at(right)
        if x is None or y is None:
            continue
        if any_sign and abs(x.imag) > 1e-20 and not a.has(sympy.I):
            continue  # Outside of the reference's domain.
        if not _same_values(left, right, tolerance, long=False):
            return False
        judged += 1
    return judged >= 2


def proportional(a: Any, b: Any, *, positive: bool = False) -> bool:
    """Whether b = c * a for a constant c other than 0, above 0 if `positive`."""
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if a.free_symbols != b.free_symbols or not 0 < len(symbols) <= len(_PRIMES):
        return False
    point = next(_points(symbols))[0]
    x, y = a.xreplace(point), b.xreplace(point)
    if number_at(x) in (None, 0) or number_at(y) in (None, 0):
        return False
    ratio = number_at(y / x)
    if ratio is None or (positive and not (abs(ratio.imag) < 1e-15 and ratio.real > 0)):
        return False
    return same_formula(a * y, b * x)


def number_at(expr: Any, digits: int = 15) -> complex | None:
    """The finite value of an expression without variables."""
    try:
        value = complex(expr.evalf(digits))
    except (TypeError, ValueError, OverflowError, ArithmeticError, AttributeError):
        return None
    return value if abs(value) < float("inf") else None


def _points(symbols: Sequence[Any]) -> Any:
    for row in range(6):
        signs = row >= 3
        yield (
            {
                symbol: Rational(
                    _PRIMES[(index * 5 + row * 3) % 12]
                    * (-1 if signs and (index + row) % 2 else 1),
                    _PRIMES[(index * 7 + row + 4) % 12] + row,
                )
                for index, symbol in enumerate(symbols)
            },
            signs,
        )


def _integer_points(symbols: Sequence[Any]) -> Any:
    for row in range(6):
        yield {s: Integer(2 + (row * (i + 2) + 3 * i) % 9) for i, s in enumerate(symbols)}, False


def _over_integers(*expressions: Any) -> bool:
    """Whether `(-1)^n` occurs, which only integers make sense of."""
    return any(
        p.base.is_number and p.base.is_negative and p.exp.free_symbols
        for e in expressions
        for p in e.atoms(sympy.Pow)
    )


def _same_values(a: Any, b: Any, tolerance: Any, *, long: bool = True) -> bool:
    for digits in (_SHORT, _LONG) if long and tolerance is None else (_SHORT,):
        x, y = _value(a, digits), _value(b, digits)
        size, apart = sympy.Max(abs(x), abs(y)), abs(x - y)
        if not (size.is_number and size.is_finite):
            return False
        if apart > size * (Rational(1, 10 ** (digits - 6)) if tolerance is None else tolerance):
            return False
    return True


def _value(expr: Any, digits: int) -> Any:
    """The value of a number to that many digits; 0 where all of them cancel."""
    try:
        return expr.evalf(digits, maxn=4 * digits, strict=True)
    except PrecisionExhausted:
        return Integer(0)

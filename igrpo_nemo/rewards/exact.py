r"""Whether two formulas are equal: exactly where both are exact, relatively where one is a decimal.

Numbers are compared as rationals or by 25 and then 400 digits; formulas in variables by their
values at unrelated points, positive ones and ones of both signs, where an identity that holds by
accident has no chance. No simplification: it takes ten times as long to fail. Powers and factorials
that would be huge are left as they stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from sympy import Integer, Rational
from sympy.core.evalf import PrecisionExhausted

_PRIMES = (17, 23, 31, 41, 53, 61, 71, 83, 97, 103, 113, 127)
_STEPS = (sympy.floor, sympy.ceiling)
_SHORT, _LONG = 25, 400


# Results with more bits stay powers, so that nothing written in a line fills the memory.
_MAX_BITS = 1 << 21


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


def power(base: Any, exponent: Any) -> Any:
    """`base ** exponent`, left as it stands where the result would be huge."""
    if base.is_Rational and exponent.is_Rational:
        bits = max(abs(base.p), base.q).bit_length() * abs(exponent.p)
        if bits > _MAX_BITS:
            if abs(base) in (0, 1) and exponent.is_Integer:
                return base**exponent
            return sympy.Pow(base, exponent, evaluate=False)
    elif base.is_number and exponent.is_Integer and abs(exponent) > 100_000:
        return sympy.Pow(base, exponent, evaluate=False)
    return base**exponent


def factorial(value: Any) -> Any:
    if value.is_Integer and value > 20_000:
        return sympy.factorial(value, evaluate=False)
    return sympy.factorial(value)


def binomial(n: Any, k: Any) -> Any:
    if n.is_Integer and abs(n) > 100_000:
        return sympy.binomial(n, k, evaluate=False)
    return sympy.binomial(n, k)

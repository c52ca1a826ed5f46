r"""Telling two expressions apart by their values, before SymPy tries to prove them equal.

`28` and `\\sqrt{34} + 3\\sqrt{10}` differ at their second digit, yet `simplify` takes ten times as
long to fail as evaluation takes to see it. Two expressions whose values differ at a point are not
equal, so this only ever shortens the way to math-verify's own "no".
"""

from __future__ import annotations

from typing import Any

# Where formulas in variables are evaluated: positive and unrelated, so that roots and logarithms
# are real and no identity holds by accident.
_POINTS = (("17", "13"), ("19", "7"), ("23", "11"), ("29", "17"), ("31", "23"), ("37", "29"))
_DIGITS = 20


def refuted(gold: list[Any], answer: list[Any], float_rounding: int = 6) -> bool:
    """Whether two results of `math_verify.parse` certainly differ.

    Speaks for plain expressions only (no sets, relations, matrices, lone symbols, percentages,
    where math-verify compares by other rules), and only where the difference is far above the
    rounding that math-verify would apply.
    """
    if len(gold) != 2 or len(answer) != 2 or gold[1] == answer[1]:
        return False
    if not (_plain(gold[0]) and _plain(answer[0])):
        return False
    from sympy import Rational

    symbols = sorted(gold[0].free_symbols | answer[0].free_symbols, key=lambda symbol: symbol.name)
    if len(symbols) > len(_POINTS):
        return False
    point = {
        symbol: Rational(int(p), int(q)) for symbol, (p, q) in zip(symbols, _POINTS, strict=False)
    }
    gold_value, answer_value = _value(gold[0], point), _value(answer[0], point)
    if gold_value is None or answer_value is None:
        return False
    size = max(1.0, abs(gold_value), abs(answer_value))
    return abs(gold_value - answer_value) > 10.0 * size * 10.0**-float_rounding


def _plain(expression: Any) -> bool:
    """Whether math-verify compares an expression by value: arithmetic, roots, powers, functions."""
    from sympy import Expr, Symbol, UnevaluatedExpr
    from sympy.core.function import AppliedUndef

    return (
        isinstance(expression, Expr)
        and not isinstance(expression, Symbol)
        and not expression.has(UnevaluatedExpr, AppliedUndef)
    )


def _value(expression: Any, point: dict[Any, Any]) -> complex | None:
    """The expression's finite value at a point, or None."""
    try:
        value = complex(expression.xreplace(point).evalf(_DIGITS))
    except (TypeError, ValueError, OverflowError, ArithmeticError, AttributeError):
        return None
    return value if abs(value) < float("inf") else None

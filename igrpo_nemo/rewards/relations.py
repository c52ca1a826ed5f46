r"""Equations, inequalities and sets of numbers.

"0 < x < 7.5"  "(0, 7.5)"  "x > 0 \land x < 7.5"   --> the same set
"y = 2x + 3"  --> Named("y", 2x + 3)      "5x^2 + 9y^2 = 45" --> Relation
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import sympy

from igrpo_nemo.rewards.formula import parse_formula, same_formula
from igrpo_nemo.rewards.grammar import Unreadable
from igrpo_nemo.rewards.spelling import split_top
from igrpo_nemo.rewards.values import Named, Number, Region, Relation, Several, Span, Value

_ORDERS = {r"\le": "<=", r"\ge": ">=", "<": "<", ">": ">", r"\ne": "!="}
_OPERATORS = (*_ORDERS, "=", r"\approx", r"\in", r"\notin")
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
_LITERAL_SET = re.compile(r"\\mathbb\s*\{?\s*([RZNQC])\s*\}?|\\emptyset")
_LITERALS = {"R": sympy.S.Reals, "Z": sympy.S.Integers, "N": sympy.S.Naturals}
_LITERALS |= {"Q": sympy.S.Rationals, "C": sympy.S.Complexes}
_INDEX = re.compile(r"_\s*(?:\{[^{}]*\}|\\?\w+)")
_CALL = re.compile(r"(?<=[A-Za-z}'])\s*\([^()]*\)")
_QUOTIENT_NAME = re.compile(
    r"\\frac\s*\{(?:d[a-z]|[A-Z]+)\}\s*\{(?:d[a-z]|[A-Z]+)\}|[A-Z]+/[A-Z]+|"
    r"\\(?:sin|cos|tan) ?\\?\w+"
)
# Names that say as much as no name: the value of a function is often called y.
_FUNCTION_NAME = re.compile(r"[a-zA-Z]'?\(.*\)|y")

Reader = Callable[[str], Value]


def is_name(text: str) -> bool:
    r"""Whether the left side of an equation only names the right one: `x_1`, `P(A)`, `AB`."""
    bare = _CALL.sub("", _INDEX.sub("", text)).strip()
    bare = re.sub(r"\\text\{(?:[^{}]|\{[^{}]*\})*\}", "W", bare)
    bare = bare.removeprefix("m") if bare.startswith(r"m\angle") else bare
    if re.fullmatch(r"[a-zA-Z]'*|W|\\[a-zA-Z]+(?:\s*\{?[A-Za-z]+\}?)?'*|[A-Z]+'*", bare):
        return bare not in ("e", "i", "E", r"\pi")
    if re.fullmatch(r"\|[A-Za-z]+\||\([a-z](?:\s*,\s*[a-z])+\)|\[[A-Z]+\]", text.strip()):
        return True
    return _QUOTIENT_NAME.fullmatch(bare) is not None


def read_relation(text: str, read: Reader) -> Value | None:
    """What a text with `=`, `<` or `\\in` says; None without any. Raises Unreadable."""
    parts, operators = split_top(text, _OPERATORS)
    if not operators:
        return None
    if operators[0] == r"\in" and len(operators) == 1:
        value = read(parts[1])
        return Named(parts[0], value) if is_name(parts[0]) else value
    if operators == [r"\notin"]:
        inside = as_set(read(parts[1]))
        if inside is None or not is_name(parts[0]):
            raise Unreadable(text)
        return Region(sympy.Complement(sympy.S.Reals, inside), parts[0])
    if r"\approx" in operators:
        at = operators.index(r"\approx")
        if at == 0 and is_name(parts[0]):
            return Named(_tidy(parts[0]), read(parts[1]))
        return read_relation(_joined(parts[: at + 1], operators[:at]), read) or read(parts[0])
    if r"\in" in operators or r"\notin" in operators:
        raise Unreadable(text)
    if all(operator == "=" for operator in operators):
        return _equation(parts, read)
    steps = _steps(parts, operators)
    return _region(steps) or Relation(steps)


def _joined(parts: list[str], operators: list[str]) -> str:
    return " ".join(x for pair in zip(parts, [*operators, ""], strict=True) for x in pair).strip()


def _tidy(name: str) -> str:
    return re.sub(r"[\s{}]", "", name)


def _equation(parts: list[str], read: Reader) -> Value:
    name = ""
    if is_name(parts[0]):
        name, parts = _tidy(parts[0]), parts[1:]
    elif len(parts) == 2 and is_name(parts[1]) and not is_name(parts[0]):
        name, parts = _tidy(parts[1]), parts[:1]
    if len(parts) == 1:
        return Named(name, read(parts[0]))
    values = [read(part) for part in parts]
    last = values[-1]
    chain = [value.expr for value in values if isinstance(value, Number)]
    if len(chain) == len(values):
        decimal = any(isinstance(value, Number) and value.digits for value in values)
        tolerance = sympy.Rational(1, 100) if decimal else None
        if all(same_formula(expr, chain[-1], tolerance) for expr in chain):
            return Named(name, last) if name else last
        if chain[0].free_symbols and not chain[-1].free_symbols and name:
            return Named(name, last)  # A formula, then its value.
        if len(parts) == 2 and not name and (chain[0] - chain[1]).free_symbols:
            return Relation((("=", chain[0] - chain[1]),))
    raise Unreadable("a chain that does not hold")


def _steps(parts: list[str], operators: list[str]) -> tuple[tuple[str, Any], ...]:
    sides = [parse_formula(part) for part in parts]
    signs = [_ORDERS.get(operator, operator) for operator in operators]
    if len(signs) > 1 and len({sign[0] for sign in signs} - {"="}) > 1:
        raise Unreadable("a chain that turns")
    if signs[0][0] == ">":
        sides, signs = sides[::-1], [_FLIPPED[sign] for sign in reversed(signs)]
    steps = zip(signs, sides, sides[1:], strict=False)
    return tuple((sign, left - right) for sign, left, right in steps)


def _region(steps: tuple[tuple[str, Any], ...]) -> Region | None:
    """The real numbers for which relations in one variable hold."""
    symbols = set().union(*(difference.free_symbols for _, difference in steps))
    if len(symbols) != 1:
        return None
    symbol = symbols.pop()
    real = sympy.Symbol("x", real=True)
    region: Any = sympy.S.Reals
    for sign, difference in steps:
        difference = difference.subs(symbol, real)
        if not (difference.is_polynomial(real) or difference.has(sympy.Abs)) or sign == "=":
            return None
        try:
            region = region.intersect(_where(difference, real, sign))
        except (NotImplementedError, TypeError, ValueError, AttributeError):
            return None
    return Region(region, str(symbol))


def _where(difference: Any, real: sympy.Symbol, sign: str) -> Any:
    """The numbers for which `difference sign 0` holds; raises what SymPy raises."""
    slope = difference.diff(real)
    rest = difference.subs(real, 0)
    if not (slope.is_Rational and slope and rest.is_Rational):
        relation: Any = sympy.Rel(difference, 0, sign)
        return relation.as_set()
    # A bound, as nearly always: SymPy's solver takes a hundred times as long for the same set.
    bound, is_open = -rest / slope, sign in ("<", ">")
    below = sympy.Interval(-sympy.oo, bound, True, is_open or sign == "!=")
    above = sympy.Interval(bound, sympy.oo, is_open or sign == "!=", True)
    if sign == "!=":
        return sympy.Union(below, above)
    return below if (sign[0] == "<") == (slope > 0) else above


def joined(parts: list[str], separators: list[str]) -> Value | None:
    r"""`x > -1 \land x < 2`, `x < -1 \lor x > 2`, `x \ge 0, x \ne 1` as one set, or None."""
    steps: list[Region] = []
    for part in parts:
        pieces, operators = split_top(part, _OPERATORS)
        if not operators or any(operator not in _ORDERS for operator in operators):
            return None
        region = _region(_steps(pieces, operators))
        if region is None:
            return None
        steps.append(region)
    if len({step.variable for step in steps}) > 1 or len(set(separators)) > 1:
        return None
    if separators[0] not in (r"\land", r"\lor"):
        unequal = sum(r"\ne" in part for part in parts)
        if not unequal:
            return None  # A comma may mean either.
    points = [step.points for step in steps]
    join = sympy.Union if separators[0] == r"\lor" else sympy.Intersection
    return Region(join(*points), steps[0].variable)


def read_region(text: str, read: Reader) -> Value | None:
    r"""Unions, intersections and differences of sets, and `\mathbb{R}`; None for other texts."""
    literal = _LITERAL_SET.fullmatch(text)
    if literal is not None:
        return Region(_LITERALS[literal[1]] if literal[1] else sympy.S.EmptySet)
    text = re.sub(r"(\\mathbb\s*\{?R\}?)\s*-\s*(?=\\\{)", r"\1\\setminus ", text)
    for operator, join in (
        (r"\cup", sympy.Union),
        (r"\setminus", sympy.Complement),
        (r"\cap", sympy.Intersection),
    ):
        parts, found = split_top(text, (operator,))
        if found:
            sets = [as_set(read(part)) for part in parts]
            if any(points is None for points in sets):
                raise Unreadable(text)
            return Region(join(*sets))
    return None


def as_set(value: Value) -> Any:
    """The set of numbers that a value is, where it can be one: an interval, a set, `(a, b)`."""
    if isinstance(value, Named):
        return as_set(value.value)
    if isinstance(value, Region):
        return value.points
    if isinstance(value, Span):
        return _interval(value.start, value.end, value.left_open, value.right_open)
    if isinstance(value, Several):
        exprs = [item.expr for item in value.items if isinstance(item, Number)]
        if len(exprs) == len(value.items):
            if value.kind == "tuple" and len(exprs) == 2:
                return _interval(exprs[0], exprs[1], True, True)
            if value.kind == "set":
                return sympy.FiniteSet(*exprs)
    return None


def _interval(start: Any, end: Any, left_open: bool, right_open: bool) -> Any:
    if (
        not (start.is_extended_real and end.is_extended_real)
        or start.free_symbols | end.free_symbols
    ):
        return None
    return sympy.Interval(start, end, left_open, right_open)


def same_names(a: str, b: str) -> bool:
    """Whether two values may be compared by what they are: equal names, or names of a function."""
    return a == b or (
        _FUNCTION_NAME.fullmatch(a) is not None and _FUNCTION_NAME.fullmatch(b) is not None
    )


def as_equation(value: Named) -> Any:
    """`y = 2x + 3` as `y - (2x + 3)`; None where a side is no formula."""
    if not isinstance(value.value, Number):
        return None
    try:
        return parse_formula(value.name) - value.value.expr
    except Unreadable:
        return None

"""Whether two values are equal: one rule for each kind, and few between kinds."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import sympy
from sympy import Rational

from igrpo_nemo.rewards.formula import number_at, proportional, same_formula
from igrpo_nemo.rewards.relations import as_equation, as_set, same_names
from igrpo_nemo.rewards.units import scales
from igrpo_nemo.rewards.values import (
    Based,
    Choice,
    Clock,
    Congruence,
    Grid,
    Named,
    Number,
    Ratio,
    Region,
    Relation,
    Several,
    Span,
    Text,
    Value,
)

# A rounded decimal must have this many digits to stand for an exact value.
_FEWEST_DIGITS = 5
# Decimals are equal to this many digits, relatively.
_PLACES = 6
_TOLERANCE = Rational(1, 10**_PLACES)


def equal(gold: Value, answer: Value) -> bool:
    """Whether an answer equals a reference, by the first rule for what either of them is."""
    for kinds, rule in (
        (Text, _text),
        (Named, _named),
        (Choice, _choice),
        (Relation, _relation),
        ((Region, Span), _region),
        (Several, _several),
        (Ratio, _ratio),
    ):
        numbers = isinstance(gold, Number) and isinstance(answer, Number)
        if not numbers and (isinstance(gold, kinds) or isinstance(answer, kinds)):
            return rule(gold, answer)
    match gold, answer:
        case Number(), Number():
            return _number(gold, answer)
        case Clock(), Clock():
            return _clock(gold, answer)
        case Grid(), Grid():
            rows = zip(gold.rows, answer.rows, strict=False)
            return len(gold.rows) == len(answer.rows) and all(_pairs(*row) for row in rows)
        case Congruence(), Congruence():
            apart = (gold.residue - answer.residue) / gold.modulus
            return gold.modulus == answer.modulus and bool(apart.is_integer)
    return isinstance(gold, Based) and gold == answer


def _text(gold: Value, answer: Value) -> bool:
    return isinstance(gold, Text) and gold == answer and bool(gold.words.strip())


def _pairs(gold: Sequence[Value], answer: Sequence[Value]) -> bool:
    return len(gold) == len(answer) and all(map(equal, gold, answer))


def _number(gold: Number, answer: Number) -> bool:
    factors = scales(gold.unit, answer.unit)
    if factors is None:
        return False
    a, b = gold.expr * _rational(factors[0]), answer.expr * _rational(factors[1])
    if not gold.percent and not answer.percent or gold.percent and answer.percent:
        return _close(a, b, gold, answer)
    if any(unit is not None and unit.dimensions for unit in (gold.unit, answer.unit)):
        return False
    # `25%` stands for 25 and for 1/4.
    for factor in (1, Rational(1, 100)):
        x, y = (a * factor, b) if gold.percent else (a, b * factor)
        if _close(x, y, gold, answer):
            return True
    return False


def _close(a: Any, b: Any, gold: Number, answer: Number) -> bool:
    if same_formula(a, b):
        return True
    if not gold.digits and not answer.digits:
        return False
    digits = min(number.digits for number in (gold, answer) if number.digits)
    if digits < _FEWEST_DIGITS or a.free_symbols != b.free_symbols:
        return False
    if any(x.is_Integer and not number.digits for x, number in ((a, gold), (b, answer))):
        return False  # Nobody rounds a whole number.
    places = max(gold.places, answer.places)
    if (digits > _PLACES or places >= _PLACES) and same_formula(a, b, _TOLERANCE):
        return True
    # An exact value, rounded to the places that were written.
    if (gold.digits and answer.digits) or places < _PLACES or a.free_symbols:
        return False
    x, y = number_at(a, 30), number_at(b, 30)
    return x is not None and y is not None and abs(x - y) <= 0.5000001 * 10.0**-places


def _named(gold: Value, answer: Value) -> bool:
    if isinstance(gold, Named) and isinstance(answer, Named):
        if same_names(gold.name, answer.name):
            return equal(gold.value, answer.value)
        a, b = as_equation(gold), as_equation(answer)
        return a is not None and b is not None and proportional(a, b)
    named = gold if isinstance(gold, Named) else answer
    other = answer if named is gold else gold
    assert isinstance(named, Named)
    if isinstance(other, Relation):
        equation = as_equation(named)
        return (
            equation is not None
            and [sign for sign, _ in other.steps] == ["="]
            and proportional(equation, other.steps[0][1])
        )
    return equal(named.value, other) if named is gold else equal(other, named.value)


def _choice(gold: Value, answer: Value) -> bool:
    if isinstance(gold, Choice) and isinstance(answer, Choice):
        if gold.letter != answer.letter:
            return False
        return not (gold.value and answer.value) or equal(gold.value, answer.value)
    choice, other = (gold, answer) if isinstance(gold, Choice) else (answer, gold)
    assert isinstance(choice, Choice)
    if choice.value is None:
        return isinstance(other, Number) and str(other.expr) == choice.letter
    return equal(choice.value, other) if choice is gold else equal(other, choice.value)


def _relation(gold: Value, answer: Value) -> bool:
    if not (isinstance(gold, Relation) and isinstance(answer, Relation)):
        return False
    if [sign for sign, _ in gold.steps] != [sign for sign, _ in answer.steps]:
        return False
    return all(
        proportional(a, b, positive=sign not in ("=", "!="))
        for (sign, a), (_, b) in zip(gold.steps, answer.steps, strict=True)
    )


def _region(gold: Value, answer: Value) -> bool:
    if isinstance(gold, Region) and isinstance(answer, Region):
        if gold.variable and answer.variable and gold.variable != answer.variable:
            return False
    if isinstance(gold, Span) and isinstance(answer, Span):
        return (gold.left_open, gold.right_open) == (
            answer.left_open,
            answer.right_open,
        ) and all(
            same_formula(a, b) for a, b in ((gold.start, answer.start), (gold.end, answer.end))
        )
    a, b = as_set(gold), as_set(answer)
    return a is not None and b is not None and _same_set(a, b)


def _several(gold: Value, answer: Value) -> bool:
    a = gold.items if isinstance(gold, Several) else (gold,)
    b = answer.items if isinstance(answer, Several) else (answer,)
    kinds = [v.kind for v in (gold, answer) if isinstance(v, Several)]
    if len(kinds) == 1:  # `\{5\}` and 5
        return len(a) == len(b) == 1 and equal(a[0], b[0])
    named = [all(isinstance(item, Named) for item in items) for items in (a, b)]
    if all(named):
        return _any_order(a, b)
    if any(named):  # `x = 1, y = 2` and `(1, 2)`
        strip = [tuple(i.value if isinstance(i, Named) else i for i in items) for items in (a, b)]
        return "set" not in kinds and _pairs(*strip)
    if set(kinds) == {"tuple", "set"}:
        return False
    if "tuple" in kinds or "ordered" in kinds:
        return _pairs(a, b)
    return _any_order(a, b)


def _any_order(gold: Sequence[Value], answer: Sequence[Value]) -> bool:
    """Each of the reference's values once, in any order."""
    if len(gold) != len(answer) or len(gold) > 60:
        return False
    left = list(answer)
    for item in gold:
        found = next((i for i, other in enumerate(left) if equal(item, other)), None)
        if found is None:
            return False
        left.pop(found)
    return True


def _ratio(gold: Value, answer: Value) -> bool:
    if isinstance(answer, Clock) and not answer.half and answer.minutes % 60 > 9:
        # `4:10` may be a time of day, but not where the reference is `2:5`.
        answer = Ratio(tuple(map(sympy.Integer, divmod(answer.minutes, 60))))
    if isinstance(gold, Ratio) and isinstance(answer, Ratio):
        if len(gold.parts) != len(answer.parts):
            return False
        a, b = gold.parts, answer.parts
        return all(same_formula(x * b[0], y * a[0]) for x, y in zip(a[1:], b[1:], strict=True))
    ratio, other = (gold, answer) if isinstance(gold, Ratio) else (answer, gold)
    assert isinstance(ratio, Ratio)
    if not isinstance(other, Number) or len(ratio.parts) != 2 or other.unit is not None:
        return False
    return same_formula(ratio.parts[0] / ratio.parts[1], other.expr)


def _clock(gold: Clock, answer: Clock) -> bool:
    if gold.half and answer.half:
        return _of_day(gold) == _of_day(answer)
    if gold.half or answer.half:
        return gold.minutes == answer.minutes or _of_day(gold) == _of_day(answer)
    return gold.minutes == answer.minutes


def _of_day(clock: Clock) -> int:
    if not clock.half or clock.minutes >= 13 * 60:
        return clock.minutes
    return clock.minutes % 720 + (720 if clock.half == "pm" else 0)


def _rational(value: Fraction) -> Any:
    return Rational(value.numerator, value.denominator)


def _same_set(a: Any, b: Any) -> bool:
    if a == b:
        return True
    left, right = _pieces(a), _pieces(b)
    if left is None or right is None or len(left) != len(right):
        return False
    return all(
        x[2:] == y[2:] and same_formula(x[0], y[0]) and same_formula(x[1], y[1])
        for x, y in zip(left, right, strict=True)
    )


def _pieces(points: Any) -> list[tuple[Any, Any, bool, bool]] | None:
    """The intervals and points of a set of real numbers, from left to right."""
    found: list[tuple[Any, Any, bool, bool]] = []
    for part in points.args if isinstance(points, sympy.Union) else (points,):
        if isinstance(part, sympy.Interval):
            found.append((part.start, part.end, bool(part.left_open), bool(part.right_open)))
        elif isinstance(part, sympy.FiniteSet):
            found.extend((point, point, False, False) for point in part.args)
        else:
            return None
    values = [number_at(start) for start, *_ in found]
    reals = [-float("inf") if value is None else value.real for value in values]
    return [piece for _, piece in sorted(zip(reals, found, strict=True), key=lambda pair: pair[0])]

"""The kinds of answers, as small typed values. A text that is none of them is a `Text`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from igrpo_nemo.rewards.units import Unit


@dataclass(frozen=True, slots=True)
class Number:
    """A formula with what stands behind it. `digits`, `places`: of its decimals, 0 where exact."""

    expr: Any
    unit: Unit | None = None
    percent: bool = False
    digits: int = 0
    places: int = 0


@dataclass(frozen=True, slots=True)
class Text:
    """Words, or a formula that nothing else reads: equal to the same text alone."""

    words: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The letter of a choice, with the value written beside it."""

    letter: str
    value: Value | None = None


@dataclass(frozen=True, slots=True)
class Clock:
    """A time of day in minutes; `half` is `am`, `pm` or empty where neither was written."""

    minutes: int
    half: str = ""


@dataclass(frozen=True, slots=True)
class Ratio:
    parts: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Based:
    """A numeral in a base that is written behind it."""

    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Several:
    """Values side by side. `kind`: `tuple`, `set`, `list` (in any order), `ordered`."""

    items: tuple[Value, ...]
    kind: str


@dataclass(frozen=True, slots=True)
class Span:
    """An interval by its ends, which may be formulas."""

    start: Any
    end: Any
    left_open: bool
    right_open: bool


@dataclass(frozen=True, slots=True)
class Region:
    """A set of real numbers (a SymPy set); `variable` where an inequality named one."""

    points: Any
    variable: str = ""


@dataclass(frozen=True, slots=True)
class Relation:
    """A chain of relations between formulas, as (operator, left minus right)."""

    steps: tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Named:
    """`x = 5`, `f(x) = x^2`: a value and what it is called."""

    name: str
    value: Value


@dataclass(frozen=True, slots=True)
class Grid:
    """A matrix, row by row."""

    rows: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True, slots=True)
class Congruence:
    residue: Any
    modulus: Any


Value = (
    Number
    | Text
    | Choice
    | Clock
    | Ratio
    | Based
    | Several
    | Span
    | Region
    | Relation
    | Named
    | Grid
    | Congruence
)

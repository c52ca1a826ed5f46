r"""What may stand behind a number: units, nouns, magnitudes. An allow-list, nothing else is read.

"km/h" --read_unit--> Unit(length^1 time^-1, 1000/3600)     "thousand dollars" --> 1000, usd
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import yaml

WORDS = yaml.safe_load((Path(__file__).parent / "words.yaml").read_text(encoding="utf-8"))
_FILLERS, _NOUNS, _CHANGING, _DIRECTIONS = (
    frozenset(WORDS[name].split()) for name in ("fillers", "nouns", "changing", "directions")
)
_MAGNITUDES = {word: Fraction(str(factor)) for word, factor in WORDS["magnitudes"].items()}


@dataclass(frozen=True, slots=True)
class Unit:
    """A power product of dimensions, its factor, and the nouns beside it (`red`, `apple`)."""

    dimensions: tuple[tuple[str, int], ...] = ()
    factor: Fraction = Fraction(1)
    nouns: frozenset[str] = frozenset()
    magnitude: Fraction = Fraction(1)
    percent: bool = False

    def agrees(self, other: Unit) -> bool:
        """Whether both may stand behind equal numbers: one without a unit agrees with any."""
        if self.nouns and other.nouns and self.nouns != other.nouns:
            return False
        if (self.nouns ^ other.nouns) & _DIRECTIONS:
            return False
        if not (self.dimensions and other.dimensions):
            # `5 cm` and `5 apples` differ; nothing at all agrees with both.
            return not (self.dimensions and other.nouns or self.nouns and other.dimensions)
        return self.dimensions == other.dimensions


@lru_cache(maxsize=1)
def _units() -> dict[str, tuple[str, Fraction]]:
    found: dict[str, tuple[str, Fraction]] = {}
    for dimension, entries in WORDS["units"].items():
        for entry in entries.split(";"):
            first, *others = entry.split()
            name, _, factor = first.partition("=")
            for word in (name, *others):
                for form in (word, f"{word}s", f"{word}es", f"{word}."):
                    found.setdefault(form, (dimension, Fraction(factor)))
    return found


def _lookup(word: str) -> tuple[str, Fraction] | None:
    return _units().get(word) or (_units().get(word.lower()) if len(word) > 2 else None)


def singular(word: str) -> str:
    for ending, instead in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("s", "")):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            return word[: -len(ending)] + instead
    return word


def counted(word: str) -> bool:
    """Whether a word is a listed noun that numbers count (`eggs`)."""
    return singular(word) in _NOUNS or word in _NOUNS


_SPEEDS = {"mph": "mile/hour", "kmph": "km/h", "kph": "km/h", "kmh": "km/h", "fps": "ft/s"}
_FACTOR = re.compile(r"(/)?\s*([^\s/^*]+?)(?:\^\{?(-?\d)\}?)?(?=[\s/*]|$)")


@lru_cache(maxsize=16_384)
def read_unit(words: str, *, reference: bool = False) -> Unit | None:
    """The unit that the words behind a number are; None where they may mean anything else.

    A reference's number may count anything (`5 red`): its nouns are compared, never judged.
    """
    if len(words) > 120:
        return None
    words = re.sub(r"\s*[,(].*|\s*\bper\b\s*", lambda m: "/" if "per" in m[0] else "", words)
    if not words:
        return None
    words = re.sub(r"\w+", lambda m: _SPEEDS.get(m[0], m[0]), words)
    words = re.sub(r"(?<=[A-Za-z])\s*(?:-1\b|\{-1\})", "^-1", words).strip(" .;:")
    powers: dict[str, int] = {}
    factor, magnitude = Fraction(1), Fraction(1)
    nouns: set[str] = set()
    percent = False
    scale = 1  # `square inches` has its power in front.
    for match in _FACTOR.finditer(words):
        word, power = match[2], int(match[3] or 1)
        bare = word.lower().strip("().,;:")
        if bare in ("square", "sq", "squares") and match.end() < len(words):
            scale = 2
        elif bare in ("cubic", "cu") and match.end() < len(words):
            scale = 3
        elif bare == "squared" and powers:
            last = list(powers)[-1]
            powers[last] *= 2
        elif bare == "cubed" and powers:
            last = list(powers)[-1]
            powers[last] *= 3
        elif bare in ("percent", "percentage", "pct"):
            percent = True
        elif bare in _MAGNITUDES and not powers:
            magnitude *= _MAGNITUDES[bare]
        elif (unit := _lookup(word.strip(".,;:") if len(word) > 1 else word)) is not None:
            sign = -1 if match[1] else 1
            power *= sign * scale
            scale = 1
            powers[unit[0]] = powers.get(unit[0], 0) + power
            factor *= unit[1] ** power
        elif bare in _FILLERS and not (reference and bare in _DIRECTIONS):
            continue
        elif _noun(bare, reference):
            nouns.add(singular(bare))
        else:
            return None
    volume = powers.pop("volume", 0)
    if volume:  # A liter is a cubic decimeter.
        powers["length"] = powers.get("length", 0) + 3 * volume
        factor *= Fraction(1, 10**6) ** volume
    dimensions = tuple(sorted((name, power) for name, power in powers.items() if power))
    return Unit(dimensions, factor, frozenset(nouns), magnitude, percent)


def _noun(word: str, reference: bool) -> bool:
    if word in _CHANGING and not (reference and word in _DIRECTIONS) or not word.isalpha():
        return False
    if counted(word):
        return True
    if reference:
        return len(word) > 1
    return len(word) > 3 and word.isascii() and word.islower() and word.endswith("s")


def scales(a: Unit | None, b: Unit | None) -> tuple[Fraction, Fraction] | None:
    """By what two numbers are multiplied before they are compared; None for units that differ.

    A number without a unit agrees with any.
    """
    if a is None or b is None:
        return Fraction(1), Fraction(1)
    if not a.agrees(b):
        return None
    both = bool(a.dimensions and b.dimensions)
    return (a.factor, b.factor) if both else (Fraction(1), Fraction(1))

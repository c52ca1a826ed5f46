r"""Reading an answer: from text to a typed value.

    text --canonical--> one spelling --stated--> what it says --structure--> Number, Span | Text

Structure is found from the outside in: lists, relations, intervals, sets, tuples, matrices, clock
times, ratios, numerals with a base, numbers with a unit, formulas. What fits nothing is a `Text`,
equal to the same text alone.
"""

from __future__ import annotations

import re
from functools import lru_cache

import sympy

from igrpo_nemo.rewards import relations
from igrpo_nemo.rewards.formula import parse_formula
from igrpo_nemo.rewards.grammar import Unreadable
from igrpo_nemo.rewards.spelling import canonical, plain, split_top, unwrapped
from igrpo_nemo.rewards.statement import parted, said_once, stated
from igrpo_nemo.rewards.units import read_unit
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
    Several,
    Span,
    Text,
    Value,
)

_MATRIX = re.compile(
    r"([(\[|]?)\s*\\begin\{([pbvBV]?matrix|smallmatrix|array)\}(?:\{[lcr|]*\})?"
    r"(.*)\\end\{\2\}\s*([)\]|]?)"
)
_CHOICE = re.compile(
    r"(?:\\text\{(?:the )?(?:correct |final )?(?i:option|choice|answer)(?: is)?"
    r"\}\s*:?\s*)?(?:\(([A-Za-z])\)|([A-Z])(?:\)|\.|:(?=\s|\\text)|$))\s*(.*)"
)
# What makes the text behind a letter name another one: `B or C`, `(A) 3 (B) 4`, `A) 3, B) 4`.
_ANOTHER_CHOICE = re.compile(
    r"^(?:\\text\{(?:and|or)\b|[,;]|\\l(?:and|or))|(?<![A-Za-z])\([A-Z]\)|(?<![A-Za-z\\(])[A-Z]\)"
)
_CLOCK = re.compile(
    r"(\d{1,2})(?::(\d{2}))?\s*(?:\\text\{)?\s*([apAP])\.?\s?[mM]\.?\s*\}?|(\d{1,2}):(\d{2})"
)
_BASED = re.compile(r"\(?([0-9A-F]*\d[0-9A-F]*|[A-F]{2,})\)?_\s*\{?\s*(?:\\text\{)?(\w+)\}?\s*\}?")
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
_BASES |= {"ten": 10, "eleven": 11, "twelve": 12, "sixteen": 16, "hex": 16}
_CONGRUENCE = re.compile(
    r"(?:(.+?)\\equiv)?\s*(.+?)\s*\(?\s*(?:\\p?mod|\\bmod|\\text\{mod\})\s*\{?\s*([^{}()]+?)\s*\}?\s*\)?"
)
_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)(?!\d|\s*\\overline|\s*\\ldots)")
_CURRENCY = re.compile(r"^([-+]?)\s*\\text\{(usd|eur|gbp|jpy|inr|rub|krw|ils|cny)\}\s*")
_GROUPS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?\s*([CF])?$")
_TRIG = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)(?![a-z])|^\^")
_EMPTY = re.compile(
    r"(?:there (?:is|are) )?no (?:real |such |integer |possible )?(?:solutions?|roots?|values?)"
    r"(?: exists?)?|empty set|the empty set"
)


@lru_cache(maxsize=16_384)
def read(text: str, *, reference: bool = False) -> Value:
    """The value of an answer; a `Text` where the reading is doubtful. Never raises for bad text."""
    bare = canonical(text)
    try:
        return _whole(bare, reference)
    except (Unreadable, RecursionError):
        return Text(plain(bare))


def _whole(text: str, reference: bool) -> Value:
    text = text.removeprefix("=").strip()
    words = re.fullmatch(r"\\text\{((?:[^{}]|\{[^{}]*\})*)\}", text)
    if words is not None:
        return _worded(plain(text))
    choice = _CHOICE.fullmatch(text)
    if choice is not None and not _ANOTHER_CHOICE.search(choice[3]):
        return _chosen(choice, reference)
    statement = stated(text)
    if statement is None:
        return Text(plain(text))
    if statement != text:
        return read_part(parted(unwrapped(statement)), reference)
    return read_part(parted(text), reference)


def _worded(words: str) -> Value:
    if _EMPTY.fullmatch(words):
        return Region(sympy.S.EmptySet)
    if re.fullmatch(r"(?:the set of )?(?:all )?real numbers|all reals?|the reals", words):
        return Region(sympy.S.Reals)
    if words in ("infinity", "inf"):
        return Number(sympy.oo)
    if words in ("negative infinity", "minus infinity"):
        return Number(-sympy.oo)
    names = re.split(r"\s*,\s*(?:and )?|\s+and\s+", words)
    if len(names) > 1 and all(name and name.count(" ") < 2 for name in names):
        return Several(tuple(map(Text, names)), "list")
    return Text(words)


def _chosen(match: re.Match[str], reference: bool) -> Value:
    letter, rest = match[1] or match[2], match[3].strip()
    if letter.islower() and (rest or letter > "h"):
        raise Unreadable(letter)
    return Choice(letter.upper(), _item(rest, reference) if rest else None)


def read_part(text: str, reference: bool) -> Value:
    """One answer, or a list of them."""
    text = unwrapped(text)
    if not text:
        raise Unreadable("nothing")
    if r"\piecewise" in text or r"\gap" in text:
        raise Unreadable("several formulas")
    text = _ungrouped(text)
    parts, separators = split_top(text, (",", ";", r"\land", r"\lor"))
    if len(parts) > 1:
        return _list(parts, separators, reference)
    return read_one(text, reference)


def _ungrouped(text: str) -> str:
    """`1,234` as 1234; in brackets it is two numbers."""

    def join(match: re.Match[str]) -> str:
        before = text[: match.start()]
        inside = sum(map(before.count, "([")) - sum(map(before.count, ")]")) + before.count(r"\{")
        return match[0] if inside > 0 else match[0].replace(",", "")

    return _GROUPS.sub(join, text) if "," in text else text


def _list(parts: list[str], separators: list[str], reference: bool) -> Value:
    parts = [part for part in parts if part]
    if not parts:
        raise Unreadable("an empty list")
    if len(parts) == 1:
        return read_one(parts[0], reference)
    joined = relations.joined(parts, separators)
    if joined is not None:
        return joined
    if any(part == r"\ldots" for part in parts):
        items = [Text(r"\ldots") if p == r"\ldots" else _item(p, reference) for p in parts]
        return Several(tuple(items), "ordered")
    items = [_item(part, reference) for part in parts]
    names = [item.name if isinstance(item, Named) else "" for item in items]
    if names[0] and not any(names[1:]):  # `n = 3, 5, 7`
        first = items[0]
        assert isinstance(first, Named)
        return Named(names[0], Several((first.value, *items[1:]), "list"))
    if all(names):
        bases = {re.sub(r"_.*", "", name) for name in names}
        if len(bases) == 1 and (len(set(names)) == 1 or all("_" in name for name in names)):
            return Several(tuple(i.value for i in items if isinstance(i, Named)), "list")
        return Several(tuple(items), "ordered")
    flat: list[Value] = []
    for item in items:  # `3 \pm 1, 5`
        nested = isinstance(item, Several) and item.kind == "list"
        flat.extend(item.items if nested and isinstance(item, Several) else [item])
    return Several(tuple(flat), "list")


def _item(text: str, reference: bool) -> Value:
    """One of several: words beside mathematics are compared as words."""
    text = unwrapped(text)
    try:
        choice = _CHOICE.fullmatch(text)
        if choice is not None and (not choice[3] or r"\text" in choice[3]):
            return _chosen(choice, reference)
        return read_one(text, reference)
    except Unreadable:
        return Text(plain(text))


def read_one(text: str, reference: bool = False) -> Value:
    """A single answer. Raises Unreadable."""
    text = unwrapped(text)
    if (congruence := _CONGRUENCE.fullmatch(text)) is not None and re.search(
        r"\\equiv|\\pmod", text
    ):
        return Congruence(parse_formula(congruence[2]), parse_formula(congruence[3]))
    related = relations.read_relation(text, lambda part: read_part(part, reference))
    if related is not None:
        return related
    if (grid := _MATRIX.fullmatch(text)) is not None:
        return _grid(grid, reference)
    enclosed = _enclosed(text, reference)
    if enclosed is not None:
        return enclosed
    if r"\pm" in text or r"\mp" in text:
        signs = ((r"\pm", r"\mp", "+", "-"), (r"\pm", r"\mp", "-", "+"))
        both = [number(text.replace(a, x).replace(b, y), reference) for a, b, x, y in signs]
        return Several(tuple(both), "list")
    if (clock := _CLOCK.fullmatch(text)) is not None:
        return _clock(clock)
    parts, _ = split_top(re.sub(r"\\text\{to\}", ":", text), (":",))
    if len(parts) > 1:
        return Ratio(tuple(parse_formula(part) for part in parts))
    if (based := _BASED.fullmatch(text)) is not None:
        return _based(based)
    return number(text, reference)


def _grid(match: re.Match[str], reference: bool) -> Value:
    left, kind, body, right = match.groups()
    if kind == "array" and not left:
        raise Unreadable("a table")
    rows = [row for row in body.split(r"\cr") if row.strip()]
    cells = tuple(tuple(read_one(cell, reference) for cell in row.split("&")) for row in rows)
    if len({len(row) for row in cells}) != 1:
        raise Unreadable("rows of different lengths")
    if kind[0] in "vV" or left == "|":
        entries = [[cell.expr for cell in row if isinstance(cell, Number)] for row in cells]
        if len(cells) != len(cells[0]) or len(cells) > 6:
            raise Unreadable("no determinant")
        return Number(sympy.expand(sympy.Matrix(entries).det()))
    return Grid(cells)


def _enclosed(text: str, reference: bool) -> Value | None:
    """Intervals, tuples and sets: what stands in one pair of brackets, or between `\\cup`."""
    region = relations.read_region(text, lambda part: read_part(part, reference))
    if region is not None:
        return region
    brackets = [(r"\{", r"\}"), (r"\langle", r"\rangle"), *"() [] (] [) ][".split()]
    for left, right in brackets:
        if not (text.startswith(left) and text.endswith(right) and len(text) > len(left)):
            continue
        inner = text[len(left) : -len(right)].strip()
        parts, _ = split_top(inner, (",", ";"))
        if left == r"\{":
            return _set(inner, parts, reference)
        if not _closes_last(text, left) or len(parts) < 2:
            continue
        is_tuple = (left, right) == ("(", ")") or left == r"\langle"
        if not is_tuple and len(parts) == 2 and r"\ldots" not in parts:
            start, end = (parse_formula(part) for part in parts)
            return Span(start, end, left != "[", right != "]")
        if is_tuple or (left, right) == ("[", "]"):
            return Several(tuple(_item(part, reference) for part in parts), "tuple")
    return None


def _set(inner: str, parts: list[str], reference: bool) -> Value:
    if not inner:
        return Region(sympy.S.EmptySet)
    condition = re.fullmatch(r"([a-z])(?:\s*\\in\s*\\mathbb\s*\{?R\}?)?\s*(?:\||:)\s*(.+)", inner)
    if condition is not None:
        return read_part(condition[2], reference)
    return Several(tuple(_item(part, reference) for part in parts), "set")


def _closes_last(text: str, left: str) -> bool:
    """Whether the first bracket closes with the last character: not so in `(a)(b)`."""
    depth = 0
    for index, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0 and 0 < index < len(text) - 1 and left in "([":
            return False
    return True


def _clock(match: re.Match[str]) -> Value:
    hour, minute, half = match[1] or match[4], match[2] or match[5] or "0", match[3]
    if int(minute) > 59 or int(hour) > 24 or (half and not 0 < int(hour) < 25):
        if half:
            raise Unreadable("no time of day")
        return Ratio((sympy.Integer(int(hour)), sympy.Integer(int(minute))))
    return Clock(int(hour) * 60 + int(minute), f"{half.lower()}m" if half else "")


def _based(match: re.Match[str]) -> Value:
    base = _BASES.get(match[2].lower()) or (int(match[2]) if match[2].isdigit() else 0)
    if not 2 <= base <= 36 or any(int(digit, 36) >= 36 for digit in match[1]):
        raise Unreadable("no base")
    return Based(match[1].lstrip("0") or "0", base)


def number(text: str, reference: bool) -> Number:
    """A formula with its unit. Raises Unreadable."""
    text = unwrapped(text)
    unit = None
    if (currency := _CURRENCY.match(text)) is not None:
        unit = read_unit(currency[2])
        text = currency[1] + text[currency.end() :]
    if (
        tail := re.search(r"\\text\{((?:[^{}]|\{[^{}]*\})*)\}$", text)
    ) is not None and tail.start():
        behind = read_unit(tail[1].strip(), reference=reference)
        front = text[: tail.start()].strip()
        if behind is None:
            front = said_once(text) if not reference or text.startswith(r"\text") else None
            if front is None:
                raise Unreadable(tail[1])
        unit, text = behind or unit, front
    if r"\text{" in text:
        once = said_once(text)
        if once is None:
            raise Unreadable("words")
        text = once
    text = unwrapped(text)
    percent = unit is not None and unit.percent
    if text.endswith("%"):
        text, percent = text[:-1].strip(), True
    if (degrees := _DEGREES.search(text)) is not None and not _TRIG.search(text):
        unit = read_unit({"C": "celsius", "F": "fahrenheit"}.get(degrees[1] or "", "degree"))
        text = text[: degrees.start()]
    expr = parse_formula(text)
    if unit is not None and unit.magnitude != 1:
        expr = expr * sympy.Rational(unit.magnitude.numerator, unit.magnitude.denominator)
    decimals = [(len((a + b).lstrip("0")), len(b)) for a, b in _DECIMAL.findall(text)]
    digits, places = min(decimals, default=(0, 0))
    if not isinstance(expr, sympy.Expr):
        raise Unreadable(text)
    return Number(expr, unit, percent, digits, places)

r"""Whether a completion's answer equals the reference: the verifiable reward's first half.

    completion --extract--> answer --literal--> verdict            (microseconds, most completions)
                               \--math-verify (parsed gold cached)--> verdict

`quick_verdict` is pure, linear and total: it may run in the training process. `full_verdict` calls
math-verify and SymPy, which can hang or exhaust memory on hostile text: `rewards.pool` runs it in
worker processes with a hard limit.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

from igrpo_nemo.rewards.extract import AnswerFormat, extract_answer
from igrpo_nemo.rewards.literal import Literal, read_literal, same_number
from igrpo_nemo.rewards.reference import is_missing_reference
from igrpo_nemo.rewards.refute import refuted


class Reason(StrEnum):
    """Why an accuracy verdict is what it is."""

    MATCH = "match"
    """The answer equals the reference: accuracy 1."""
    MISMATCH = "mismatch"
    """Both were read and they differ."""
    NO_ANSWER = "no_answer"
    """No complete answer outside the thinking."""
    UNPARSEABLE = "unparseable"
    """There is an answer, but no mathematics could be read from it, and its text differs; or it is
    nested deeper than `max_answer_depth`."""
    TIMEOUT = "timeout"
    """The comparison met its time or memory limit, or the group's deadline."""
    TOO_LONG = "too_long"
    """The answer (or the reference) is longer than `max_answer_chars`."""
    NO_REFERENCE = "no_reference"
    """The reference is empty or says that there is none (`NaN`): nothing is equal to it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on one completion. `answer` is the extracted text, None without one."""

    reason: Reason
    answer: str | None = None

    @property
    def correct(self) -> bool:
        return self.reason is Reason.MATCH


@dataclass(frozen=True, slots=True)
class AccuracySettings:
    """How answers are found and compared.

    `match_types` (`latex`, `expr`) are math-verify's extraction targets; `float_rounding` and
    `numeric_precision` its decimal places and digits. With `verbatim` the text goes to math-verify
    as it is, without the canonical form of `as_math`.
    """

    answer_format: AnswerFormat = AnswerFormat.ANY
    max_answer_chars: int = 2_000
    max_answer_depth: int = 25
    match_types: tuple[str, ...] = ("latex", "expr")
    float_rounding: int = 6
    numeric_precision: int = 15
    verbatim: bool = False


DEFAULT_SETTINGS = AccuracySettings()

_ENVIRONMENT = re.compile(r"(?<!\\)\$.*(?<!\\)\$|\\\(.*\\\)|\\\[.*\\\]|\\boxed|\\fbox", re.DOTALL)
_WRAPPED = re.compile(
    r"\$\$([^$]+)\$\$|\$((?:[^$\\]|\\.)+)\$|\\\(((?:(?!\\\)).)+)\\\)|\\\[((?:(?!\\\]).)+)\\\]",
    re.DOTALL,
)
# Spellings of one thing: `\dfrac` and `\frac`, `\left(` and `(`, `\mathrm{e}` and `e`; `\!` is
# nothing.
_SPELLINGS = re.compile(
    r"(\\)[dt](?=frac)|\\(?:left|right)(?=[()\[\]])|\\!\s*|\\(?:mathrm|operatorname)\{([ei])\}"
)
# `12,\!345` and `12{,}345`, which can only be one number; a bare comma may separate two.
_GROUPED = re.compile(r"(?<=\d)(?:,\\!\s*|\{,\})(?=\d{3}(?!\d))")
# math-verify takes a last letter after a space for a unit (`a + b + c` becomes `a + b +`).
_LAST_VARIABLE = re.compile(r"([-+*/=<>(,^])\s+([A-Za-z])$")
_PERCENT = re.compile(r"(?P<number>.*[^\s\\])\s*(?:\\?%|\b(?:percent|percentage|pct)\b)", re.DOTALL)
_SPACED_THOUSANDS = re.compile(r"(?<![\d.])([1-9]\d{0,2})((?:(?:\\,|\\ |[ ~])\d{3})+)(?![\d])")
_CURRENCY = re.compile(r"^(-?)\\?\$(?=[\d.])")
_THOUSANDS_SPACE = re.compile(r"\\,|\\ |[ ~]")
_TEXT_COMMAND = re.compile(r"\\[a-zA-Z]+\s*(?:\{[^{}]*\})?")
_WORD = re.compile(r"(?<![^\s\"'(])[A-Za-z]{3,}(?![^\s.,;:!?)\"'])")
_MATH_WORDS = frozenset(
    "sin cos tan cot sec csc log exp sqrt max min gcd lcm mod det inf infinity and".split()
)
_DOLLAR = re.compile(r"(?<!\\)\$")
_BRACKET = re.compile(r"[()\[\]{}]")
_OPERATOR = re.compile(r"[=+*/^_\\<>|{}\[\]]")


@dataclass(frozen=True, slots=True)
class MathText:
    """What is handed to math-verify: a text, and the extraction targets to look for in it.

    `formula` says that the whole text is one formula, so that math-verify reads all of it or
    keeps it as a string: two equal ones are then equal to it whatever they say.
    """

    text: str
    targets: tuple[str, ...]
    formula: bool = False


def as_math(text: str) -> MathText:
    r"""An answer in the form in which math-verify reads it best.

    math-verify looks for mathematics inside running text, so a bare answer must be marked as
    mathematics, or `x + 2` would be read as the number 2. A sentence (`18 dollars`) stays a
    sentence; a text with its own `$...$` inside is left alone; a percent sign goes behind the
    formula, where the parser knows it; a sentence's full stop is dropped.
    """
    verbatim, text = text, _bare(text)
    if _ENVIRONMENT.search(text):
        if not _math_outside_dollars(text):
            return MathText(verbatim, ("latex", "expr"))
        text = text.replace("$", "")
    text = _CURRENCY.sub(r"\1", text)
    text = _LAST_VARIABLE.sub(r"\1\2", text)
    text = _SPACED_THOUSANDS.sub(lambda m: m[1] + _THOUSANDS_SPACE.sub("", m[2]), text)
    if _is_sentence(text):
        return MathText(text, ("latex", "expr"))
    if (percent := _PERCENT.fullmatch(text)) is not None and "$" not in text:
        return MathText(f"$${percent['number']}$$\\%", ("latex",), formula=True)
    if _balanced(text):
        return MathText(f"\\boxed{{{text}}}", ("latex",), formula=True)
    return MathText(f"$${text}$$", ("latex",))


def _bare(text: str) -> str:
    """The text without bold marks, a sentence's full stop, and a math environment all around."""
    text = " ".join(text.split()).removeprefix("**").removesuffix("**").strip()
    text = _without_stop(text)
    wrapped = _WRAPPED.fullmatch(text)
    if wrapped is not None:
        text = _without_stop(next(group for group in wrapped.groups() if group).strip())
    text = _GROUPED.sub("", text)
    return _SPELLINGS.sub(lambda m: m[1] or m[2] or "", text)


def _without_stop(text: str) -> str:
    while text.endswith((".", ",", ";", ":")):
        text = text[:-1].removesuffix("\\").rstrip()
    return text


def _math_outside_dollars(text: str) -> bool:
    """Whether `$` signs pair up the wrong way: formulas stand outside of them (`a+$ $b`)."""
    outside = " ".join(_DOLLAR.split(text)[0::2])
    if "$" not in text or re.search(r"\\[a-zA-Z]|[=^_]", outside) is None:
        return False
    return _WORD.search(_TEXT_COMMAND.sub(" ", outside)) is None


def _is_sentence(text: str) -> bool:
    """Words around a number, rather than a formula."""
    if not any(char.isdigit() for char in text):
        return False
    words = [
        word
        for word in _WORD.findall(_TEXT_COMMAND.sub(" ", text))
        if word.lower() not in _MATH_WORDS
    ]
    return len(words) >= 3 or (bool(words) and _OPERATOR.search(text) is None)


def _balanced(text: str) -> bool:
    depth = 0
    for char in text:
        depth += (char == "{") - (char == "}")
        if depth < 0:
            return False
    return depth == 0


@lru_cache(maxsize=1)
def _math_verify() -> Any:
    """math-verify, imported on first use and told not to log what it reads."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
    return math_verify


# A pass through the grammar and through SymPy's comparisons: the parser builds its tables, and
# SymPy imports its parts, on first use.
_WARM_UP = (
    ("\\frac{1}{2}", "\\sqrt{2}"),
    ("2\\sqrt{3} + \\sqrt[3]{5}", "\\sqrt{34} - 3\\sqrt{10}"),
    ("x^2 - 3xy + 4", "(x - 1)(y + 2)^{2}"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(1, 2)"),
    ("[0, 1) \\cup (2, \\infty)", "(-\\infty, 3]"),
    ("\\{1, 2, 3\\}", "1, 2"),
    ("x = 5", "y \\le 7"),
    (
        "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}",
        "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
    ),
    ("\\text{4:30 p.m.}", "4:30 \\text{ p.m.}"),
    ("\\sin \\theta + \\log_2 8", "e^{i\\pi} + \\binom{5}{2} + 3!"),
    ("12 dollars", "12.5 \\text{ cm}^2"),
    ("25\\%", "45^\\circ"),
    ("1{,}000.25", "10^{-3} \\times 2"),
)


def warm_up() -> None:
    """Import math-verify and build its tables, so that the first items are not charged for it."""
    for gold, answer in _WARM_UP:
        full_verdict(gold, answer)


def _parse(text: str, settings: AccuracySettings) -> list[Any]:
    math_verify = _math_verify()
    targets = settings.match_types
    if not settings.verbatim:
        math = as_math(text)
        text, targets = math.text, math.targets
    configs = {
        "latex": math_verify.LatexExtractionConfig(),
        "expr": math_verify.ExprExtractionConfig(),
    }
    # No time limit here: math-verify's own uses signals, which only a main thread may. The pool
    # limits the whole item from outside.
    return math_verify.parse(
        text, extraction_config=[configs[name] for name in targets], parsing_timeout=None
    )


@lru_cache(maxsize=16_384)
def _parse_gold(gold: str, settings: AccuracySettings) -> list[Any]:
    return _parse(gold, settings)


def readable(parsed: list[Any]) -> bool:
    """Whether math-verify read mathematics, not only a string, from a text."""
    return any(not isinstance(item, str) for item in parsed)


def gold_verdict(gold: str, settings: AccuracySettings = DEFAULT_SETTINGS) -> Reason:
    """Whether a reference answer can serve as one. May hang: run it in the pool.

    MATCH where mathematics is read from it and math-verify finds it equal to itself, MISMATCH
    where it does not, NO_ANSWER for an empty one, NO_REFERENCE for `NaN` and the like, TOO_LONG,
    UNPARSEABLE where nothing can be read: it would be a silent constant reward.
    """
    if not gold.strip():
        return Reason.NO_ANSWER
    if is_missing_reference(gold):
        return Reason.NO_REFERENCE
    if len(gold) > settings.max_answer_chars:
        return Reason.TOO_LONG
    if not settings.verbatim and read_literal(gold.strip()) is not None:
        return Reason.MATCH
    if not readable(_parse_gold(gold, settings)):
        return Reason.UNPARSEABLE
    return full_verdict(gold, gold, settings)


def full_verdict(gold: str, answer: str, settings: AccuracySettings = DEFAULT_SETTINGS) -> Reason:
    """math-verify's verdict on an extracted answer. May hang: run it in the pool.

    Returns MATCH, MISMATCH or UNPARSEABLE.
    """
    try:
        gold_parsed = _parse_gold(gold, settings)
        parsed = _parse(answer, settings)
        equal = (
            bool(parsed)
            and not refuted(gold_parsed, parsed, settings.float_rounding)
            and _math_verify().verify(
                gold_parsed,
                parsed,
                float_rounding=settings.float_rounding,
                numeric_precision=settings.numeric_precision,
                timeout_seconds=None,
            )
        )
    except (RecursionError, MemoryError, ValueError, TypeError, ArithmeticError):
        # The boundary to the parser: text that breaks it is an answer nobody can read.
        return Reason.UNPARSEABLE
    if equal:
        return Reason.MATCH
    return Reason.MISMATCH if readable(parsed) else Reason.UNPARSEABLE


def quick_verdict(
    gold: str, answer: str, settings: AccuracySettings = DEFAULT_SETTINGS
) -> Reason | None:
    """The verdict where it is certain without a parser; None where math-verify must be asked.

    Never contradicts `full_verdict`: it decides between plain numbers, between letters, and that a
    formula equals itself.
    """
    if settings.verbatim:
        return None
    gold_number = _gold_literal(gold)
    if gold_number is not None and (answer_number := read_literal(answer)) is not None:
        same = same_number(gold_number, answer_number, float_rounding=settings.float_rounding)
        if same is not None:
            return Reason.MATCH if same else Reason.MISMATCH
    if len(answer) > 2 * len(gold) + 40:
        return None
    gold_formula = _gold_formula(gold)
    return Reason.MATCH if gold_formula is not None and as_math(answer) == gold_formula else None


@lru_cache(maxsize=16_384)
def _gold_literal(gold: str) -> Literal | None:
    return read_literal(gold.strip())


@lru_cache(maxsize=16_384)
def _gold_formula(gold: str) -> MathText | None:
    """A reference as a formula that surely equals itself, or None."""
    math = as_math(gold)
    # White space, empty `\text{}` and the like are no formula, whatever stands around them.
    substance = any(char.isalnum() for char in _TEXT_COMMAND.sub("", _bare(gold)))
    return math if math.formula and substance else None


_GROUPING = re.compile(r"\\!|\{,\}")


@lru_cache(maxsize=16_384)
def _has_parts(gold: str) -> bool:
    """Whether a reference lists several things, so that several boxes may answer it."""
    return (
        re.search(r",(?!\s?\d{3}(?!\d))|;|\b(?:and|or)\b|\\pm", _GROUPING.sub("", gold)) is not None
    )


def find_answer(
    gold: str,
    text: str,
    settings: AccuracySettings = DEFAULT_SETTINGS,
    *,
    thinking_open: bool = False,
    truncated: bool = False,
) -> str | Verdict:
    """The extracted answer, or the verdict where there is none that may be compared."""
    if is_missing_reference(gold):
        return Verdict(Reason.NO_REFERENCE)
    answer = extract_answer(
        text,
        settings.answer_format,
        thinking_open=thinking_open,
        truncated=truncated,
        several=_has_parts(gold),
    )
    if answer is None:
        return Verdict(Reason.NO_ANSWER)
    if max(len(answer), len(gold)) > settings.max_answer_chars:
        return Verdict(Reason.TOO_LONG)
    if len(answer) > settings.max_answer_depth and _depth(answer) > settings.max_answer_depth:
        # The parser's time grows exponentially with the nesting: it would only meet its limit.
        return Verdict(Reason.UNPARSEABLE)
    return answer


def _depth(text: str) -> int:
    """How deep brackets of any kind are nested."""
    deepest = depth = 0
    for bracket in _BRACKET.findall(text):
        depth = depth + 1 if bracket in "([{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def verify_completion(
    gold: str,
    text: str,
    settings: AccuracySettings = DEFAULT_SETTINGS,
    *,
    thinking_open: bool = False,
    truncated: bool = False,
) -> Verdict:
    """Extract and compare in this process, without a time limit: for trusted text and workers."""
    answer = find_answer(gold, text, settings, thinking_open=thinking_open, truncated=truncated)
    if isinstance(answer, Verdict):
        return answer
    reason = quick_verdict(gold, answer, settings) or full_verdict(gold, answer, settings)
    return Verdict(reason, answer)

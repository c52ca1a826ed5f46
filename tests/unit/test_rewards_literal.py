"""The fast path: fuzzed against the full comparison, which it must never contradict."""

import random

import pytest

from igrpo_nemo.rewards.accuracy import Reason, full_verdict, quick_verdict
from igrpo_nemo.rewards.literal import read_literal

LETTERS = "ABCDFGHJKLMNOPQRSTUVWXYZ"


def _number(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.4:
        return str(rng.randint(0, 12))
    if kind < 0.7:
        return "0" * rng.randint(0, 2) + str(rng.randint(0, 9_999))
    return str(rng.randint(0, 10 ** rng.randint(3, 14)))


def _grouped(rng: random.Random) -> str:
    return f"{rng.randint(1_000, 10 ** rng.randint(4, 12)):,}".replace(
        ",", rng.choice([",", "{,}", ",\\!"])
    )


def _decimal(rng: random.Random) -> str:
    return rng.choice(
        [
            f"{rng.randint(0, 3_000) / rng.choice([2, 4, 8, 10, 100, 1000]):g}",
            f"{rng.random() * rng.choice([1, 10, 1000, 1e6]):.{rng.randint(1, 14)}f}",
            f".{rng.randint(0, 99)}",
            f"{rng.randint(0, 20)}.{'0' * rng.randint(1, 7)}{rng.choice(['', '1', '5'])}",
        ]
    )


def _fraction(rng: random.Random) -> str:
    command = rng.choice(["frac", "dfrac", "tfrac"])
    return f"\\{command}{{{_number(rng)}}}{{{_number(rng)}}}"


def _mixed(rng: random.Random) -> str:
    below = rng.randint(2, 12)
    return (
        f"{rng.randint(0, 12)}{rng.choice(['', ' '])}\\frac{{{rng.randint(1, below)}}}{{{below}}}"
    )


def _slash(rng: random.Random) -> str:
    return f"{_number(rng)}/{_number(rng)}"


PREFIXES = ["", "", "", "\\$", "$"]
SUFFIXES = [""] * 8 + [
    *("\\%", "%", " \\%", "^\\circ", "^{\\circ}", "\\text{ cm}", " \\text{ square units}"),
    *("\\ \\text{m}", "\\text{th}", "\\mathrm{ cm}", "\\mbox{ dogs}", "\\text{ a.m.}"),
]
ENVIRONMENTS = ["$%s$", "\\(%s\\)", "\\[%s\\]", "$ %s $"]


def _text(rng: random.Random) -> str:
    if rng.random() < 0.05:
        return rng.choice(["%s", "(%s)", "\\text{%s}", "\\text{(%s)}"]) % rng.choice(LETTERS)
    kinds = [_number, _number, _number, _grouped, _decimal, _fraction, _fraction, _mixed, _slash]
    sign = rng.choice(["", "", "-"])
    text = sign + rng.choice(PREFIXES) + rng.choice(kinds)(rng) + rng.choice(SUFFIXES)
    if rng.random() < 0.1 and "$" not in text:
        return rng.choice(ENVIRONMENTS) % text
    return text


def _respelled(text: str, rng: random.Random) -> str:
    """The same text, the same number in other words, or another number."""
    number = read_literal(text)
    kind = rng.random()
    if kind < 0.3:
        return text
    if kind < 0.5:
        return text.replace(",\\!", "").replace("{,}", "").replace("dfrac", "frac")
    if kind < 0.7 and number is not None and not number.letter:
        value = number.value
        fraction = f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
        return rng.choice(
            [
                str(value),
                fraction,
                f"{float(value):.6f}",
                f"{float(value):.12g}",
                f"{int(value)}\\%",
            ]
        )
    return _text(rng)


def test_the_fast_path_never_contradicts_the_full_one():
    rng = random.Random(20_260)
    decided = 0
    for _ in range(1_000):
        gold = _text(rng)
        answer = _respelled(gold, rng)
        quick = quick_verdict(gold, answer)
        if quick is not None:
            decided += 1
            assert quick is full_verdict(gold, answer), (gold, answer)
    assert decided > 600


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        ("1,000", "1{,}000", Reason.MATCH),
        ("12\\frac{3}{5}", "\\frac{63}{5}", Reason.MATCH),
        ("48^\\circ", "48", Reason.MATCH),
        ("\\$6", "6 \\text{ dollars}", Reason.MATCH),
        ("25\\%", "25", Reason.MATCH),
        ("25\\%", "0.26", Reason.MISMATCH),
        ("0.5", "\\frac{1}{2}", Reason.MATCH),
        ("\\frac{1}{3}", "0.34", Reason.MISMATCH),
        ("A", "\\text{(A)}", Reason.MATCH),
        ("A", "B", Reason.MISMATCH),
        ("4a-2", "4a-2", Reason.MATCH),
        ("\\dfrac{\\pi}{2}", "$\\frac{\\pi}{2}$", Reason.MATCH),
        # Only the full comparison can tell.
        ("\\frac{1}{3}", "0.333333", None),
        ("x+1", "1+x", None),
        ("1,2", "1,2,3", None),
        ("12:30", "12:31", None),
        ("9^{9^{9}}", "5", None),
    ],
)
def test_what_the_fast_path_decides(gold, answer, verdict):
    assert quick_verdict(gold, answer) is verdict


def test_texts_that_are_no_plain_numbers_are_left_alone():
    texts = ["", "-", ".", "1e5", "٣", "1 000", "1,2", "5.", "\\frac{1}{0}", "3\\frac{4}{2}", "E"]
    assert [text for text in texts if read_literal(text) is not None] == []

"""Pairs that are equal or unequal by construction: no verdict may be wrong.

`IGRPO_FUZZ_DRAWS` is the number of draws of each of the twelve kinds. The default, 200, makes
about 9,000 pairs in 20 CPU seconds; the same number always makes the same pairs.
"""

import os

import sympy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from igrpo_nemo.rewards.accuracy import Reason, full_verdict, quick_verdict
from igrpo_nemo.rewards.literal import read_literal

DRAWS = int(os.environ.get("IGRPO_FUZZ_DRAWS", "200"))
fuzz = settings(
    max_examples=DRAWS,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

VARIABLES = sympy.symbols("a b c d h m n r s t x y R V")
UNITS = ["cm", "m", "km", "kg", "apples", "hours", "square units", "mph", "dollars"]
SMALL = st.integers(-12, 12)
POSITIVE = st.integers(1, 12)


def check(gold, answer, equal):
    """The full verdict is the one by construction, and the fast path does not contradict it."""
    full = full_verdict(gold, answer)
    assert (full is Reason.MATCH) == equal, (gold, answer, equal)
    assert quick_verdict(gold, answer) in (None, full), (gold, answer)


@st.composite
def expressions(draw, depth=2):
    """A SymPy expression in a few variables."""
    kind = draw(
        st.sampled_from(["number", "variable", "sum", "product", "power", "root", "quotient"])
    )
    if depth == 0 or kind == "number":
        return sympy.Rational(draw(SMALL), draw(POSITIVE))
    if kind == "variable":
        return draw(st.sampled_from(VARIABLES))
    left = draw(expressions(depth - 1))
    if kind == "power":
        return left ** draw(st.integers(1, 3))
    if kind == "root":
        return left * sympy.sqrt(draw(POSITIVE))
    right = draw(expressions(depth - 1))
    if kind == "quotient":
        return left / right if right != 0 else left
    return left + right if kind == "sum" else left * right


def written(draw, expression):
    """One of the notations for an expression."""
    style = draw(st.sampled_from(["latex", "latex", "ascii", "expanded", "together"]))
    if style == "ascii":
        return str(expression)
    if style == "expanded":
        return sympy.latex(sympy.expand(expression))
    if style == "together":
        return sympy.latex(sympy.together(expression))
    return sympy.latex(expression)


@fuzz
@given(st.data())
def test_equal_expressions_in_other_notations(data):
    expression = data.draw(expressions())
    check(sympy.latex(expression), written(data.draw, expression), True)


@fuzz
@given(st.data())
def test_expressions_that_differ(data):
    expression = data.draw(expressions())
    change = data.draw(
        st.sampled_from(["plus one", "factor", "lost letter", "case", "sign", "tiny"])
    )
    other = {
        "plus one": expression + 1,
        "factor": expression * data.draw(st.sampled_from(VARIABLES)),
        "lost letter": expression.subs(data.draw(st.sampled_from(VARIABLES)), 1),
        "case": expression.subs(sympy.Symbol("r"), sympy.Symbol("R")),
        "sign": -expression,
        "tiny": expression + sympy.Rational(1, 10**11),
    }[change]
    equal = sympy.simplify(expression - other) == 0
    check(sympy.latex(expression), written(data.draw, other), bool(equal))


@fuzz
@given(st.integers(-(10**6), 10**6), st.integers(-30, 30), st.data())
def test_numbers_in_other_forms(mantissa, exponent, data):
    value = sympy.Rational(mantissa) * sympy.Rational(10) ** exponent
    forms = [
        f"{mantissa} \\times 10^{{{exponent}}}",
        f"{mantissa}*10^{exponent}",
        f"{mantissa}e{exponent}",
        sympy.latex(value),
        str(value),
        f"{mantissa} · 10^{{{exponent}}}".replace("-", "−"),
    ]
    gold, answer = (data.draw(st.sampled_from(forms)) for _ in range(2))
    check(gold, answer, True)
    other = mantissa + data.draw(st.sampled_from([-1, 1, 7]))
    check(gold, f"{other} \\times 10^{{{exponent}}}", False)
    if mantissa:
        check(gold, f"{mantissa} \\times 10^{{{exponent - 1}}}", False)


DIGITS = st.one_of(
    st.integers(0, 12), st.integers(0, 9_999), st.integers(0, 10**14), st.integers(0, 10**40)
).map(str)
FRACTIONS = st.builds("\\{}{{{}}}{{{}}}".format, st.sampled_from(["frac", "dfrac"]), DIGITS, DIGITS)
LITERALS = st.one_of(
    DIGITS,
    st.builds(str.replace, st.integers(1_000, 10**12).map("{:,}".format), st.just(","),
              st.sampled_from([",", "{,}", ",\\!"])),
    st.builds(str.zfill, DIGITS, st.integers(1, 6)),
    st.builds("{}.{}".format, st.one_of(st.integers(0, 3_000), st.just("")),
              st.text("0015", min_size=1, max_size=9)),
    FRACTIONS,
    st.builds("{}{}\\frac{{{}}}{{{}}}".format, SMALL, st.sampled_from(["", " "]), SMALL, POSITIVE),
    st.builds("{}/{}".format, DIGITS, DIGITS),
    st.builds(str.format, st.sampled_from(["{}", "({})", "\\text{{{}}}", "\\text{{({})}}"]),
              st.sampled_from("ABCDFGHJKLMNOPQRSTUVWXYZ")),
)  # fmt: skip
AFFIXES = [*["{}"] * 6, "-{}", "\\${}", "${}", "{}\\%", "{}%", "{}^\\circ", "{}^{{\\circ}}"]
AFFIXES += ["{}\\text{{ cm}}", "{} \\text{{ square units}}", "{}\\text{{th}}", "{}\\mathrm{{ cm}}"]
AFFIXES += ["{}\\mbox{{ dogs}}", "{}\\text{{ a.m.}}", "${}$", "\\({}\\)", "\\[{}\\]"]


def test_plain_numbers_are_read_as_the_full_comparison_reads_them():
    """The same number in other words, or another one; the fast path decides most of them."""
    decided = []

    @settings(fuzz, max_examples=3 * DRAWS)
    @given(LITERALS, LITERALS, st.sampled_from(AFFIXES), st.sampled_from(AFFIXES), st.data())
    def compare(left, right, one, other, data):
        gold = one.format(left)
        number = read_literal(gold)
        spelled = [right, left.replace(",\\!", "").replace("{,}", "").replace("dfrac", "frac")]
        if number is not None and not number.letter:
            value = number.value
            spelled += [str(value), f"\\frac{{{value.numerator}}}{{{value.denominator}}}"]
            spelled += [f"{float(value):.6f}", f"{float(value):.12g}", f"{int(value)}\\%"]
        answer = other.format(data.draw(st.sampled_from(spelled)))
        quick = quick_verdict(gold, answer)
        decided.append(quick is not None)
        assert quick in (None, full_verdict(gold, answer)), (gold, answer)

    compare()
    assert sum(decided) > 0.6 * len(decided)


@fuzz
@given(st.lists(SMALL, min_size=2, max_size=5), st.data())
def test_lists_keep_repeats_and_tuples_their_order(numbers, data):
    shuffled = data.draw(st.permutations(numbers))
    gold, answer = (", ".join(map(str, items)) for items in (numbers, shuffled))
    check(gold, answer, True)
    check(f"({gold})", f"({answer})", numbers == shuffled)
    check(f"({gold})", f"\\{{{gold}\\}}", False)
    check(gold, f"{answer}, {numbers[0]}", False)
    check(gold, ", ".join(map(str, [*shuffled[1:], shuffled[0] + 1])), False)
    check(str(numbers[0]), f"${answer.replace(', ', '$ $')}$", False)


@settings(fuzz, max_examples=DRAWS // 4)  # the slowest kind, of few forms
@given(SMALL, POSITIVE, st.booleans(), st.booleans(), st.data())
def test_intervals_and_inequalities(start, width, left_open, right_open, data):
    end = start + width
    interval = f"{'(' if left_open else '['}{start}, {end}{')' if right_open else ']'}"
    left, right = ("<" if is_open else r"\le" for is_open in (left_open, right_open))
    chain = f"{start} {left} x {right} {end}"
    both = f"x {'>' if left_open else '>='} {start} \\text{{ and }} x {right} {end}"
    gold, answer = data.draw(st.permutations([interval, chain, both]))[:2]
    check(gold, answer, True)
    check(gold, both.replace("and", "or"), False)
    check(gold, f"{start} {left} x {right} {end + 1}", False)
    other = f"{'[' if left_open else '('}{start}, {end}{')' if right_open else ']'}"
    check(gold, other, False)


@fuzz
@given(st.integers(1, 500), st.sampled_from(UNITS), st.sampled_from(UNITS))
def test_units(number, unit, other):
    check(f"{number} \\text{{ {unit}}}", f"{number}", True)
    check(f"{number}", f"{number}\\text{{ {unit}}}", True)
    check(f"{number}\\text{{ {unit}}}", f"{number} \\text{{ {other}}}", unit == other)
    check(f"{number}", f"{number + 1}\\text{{ {unit}}}", False)
    for word in ("thousand", "is wrong", "or more", "squared", "halves"):
        check(f"{number}", f"{number}\\text{{ {word}}}", False)


@fuzz
@given(st.integers(2, 99), st.sampled_from("abcdghjklmnopqrstuvwxyzABCDFGHKLMNPRSTVW"))
def test_a_letter_is_never_a_unit(number, letter):
    for text in (f"{number}{letter}", f"{number} {letter}", f"\\frac{{{number}}}{{7}}{letter}"):
        check(text, text.replace(letter, "").strip(), False)
        check(text.replace(letter, "").strip(), text, False)
        check(text, text, True)
    check(f"x^2 + {number}{letter}", f"x^2 + {number}", False)


@fuzz
@given(st.text("ABCDEFT", min_size=3, max_size=5), st.data())
def test_words_are_no_products(word, data):
    other = "".join(data.draw(st.permutations(word)))
    check(word, other, word == other)
    check(f"\\text{{{word}}}", f"\\text{{{other}}}", word == other)
    check(word.capitalize(), other.capitalize(), word == other)


@fuzz
@given(st.integers(1, 12), st.integers(0, 59), st.integers(1, 12), st.integers(0, 59))
def test_clock_times(hour, minute, other_hour, other_minute):
    gold, answer = f"{hour}:{minute:02}", f"{other_hour}:{other_minute:02}"
    check(gold, answer, gold == answer)
    check(f"{gold} \\text{{ AM}}", f"{gold}\\text{{ p.m.}}", False)
    check(f"{gold} \\text{{ PM}}", f"{gold}\\text{{ p.m.}}", True)
    check(f"{gold} \\text{{ PM}}", f"{answer} PM", gold == answer)


@fuzz
@given(st.text("01", min_size=2, max_size=8), st.integers(2, 16), st.integers(2, 16))
def test_bases(digits, base, other):
    gold = f"{digits}_{{{base}}}"
    check(gold, f"{digits}_{{{other}}}", base == other)
    check(gold, digits, False)
    check(digits, gold, False)


@fuzz
@given(st.integers(2, 400), st.data())
def test_prose_that_says_several_things(number, data):
    other = number + data.draw(POSITIVE)
    order = data.draw(st.permutations([number, other]))
    for sentence in ("It is {} or {}", "either {} or {}", "$ {} $ $ {} $", "{} {}", "{}, {}"):
        check(str(number), sentence.format(*order), False)
    for sentence in ("The answer is not {}", "not {}", "{} is wrong", "anything but {}"):
        check(str(number), sentence.format(number), False)
    check(str(number), f"The answer is {number}.", True)

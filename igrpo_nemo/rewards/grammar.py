r"""The grammar of formulas: a descent over the tokens of LaTeX and ASCII notation, in linear time.

sum > product > unary > power > atom; a product without a sign binds no tighter than `*`, but
behind a quotient it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import sympy
from sympy import E, I, Integer, Rational, Symbol, pi

from igrpo_nemo.rewards.spelling import FUNCTIONS, WORDS, is_word

_TOKEN = re.compile(
    r"\\[a-zA-Z]+|\\.|\d+\.\d+|\.\d+|\d+\.?|[a-zA-Z]+|[-+*/^_!'|()\[\]{},=<>:%&;]|\S"
)
_LETTER_GROUP = re.compile(r"[A-Z](?:_\{?\d\}?|')*(?:\s*[A-Z](?:_\{?\d\}?|')*)+")
_MAX_TOKENS = 1_500
# Results with more bits stay powers, so that nothing written in a line fills the memory.
_MAX_BITS = 1 << 21

_GREEK, _MARKS = frozenset(WORDS["greek_names"].split()), frozenset(WORDS["marks"].split())


class Unreadable(ValueError):
    """A text of which the reading is doubtful."""


def _log(value: Any, base: Any) -> Any:
    return sympy.log(value) / sympy.log(base)


_CALLS: dict[str, Callable[..., Any]] = {
    name: getattr(sympy, known) for known, names in WORDS["calls"].items() for name in names.split()
}
_INVERSES = {name: getattr(sympy, f"a{name}") for name in WORDS["inverted"].split()}
_SEVERAL = {"gcd": sympy.gcd, "lcm": sympy.lcm, "max": sympy.Max, "min": sympy.Min}
_TRIG = frozenset("sin cos tan cot sec csc".split())


class Parser:
    def __init__(self, text: str) -> None:
        self.tokens = _TOKEN.findall(text)
        if len(self.tokens) > _MAX_TOKENS:
            raise Unreadable(text)
        self.tokens = [piece for token in self.tokens for piece in _letters(token)]
        self.at = 0
        self.bars = 0
        self.trig = 0
        bare = [
            t for t, before in zip(self.tokens, ["", *self.tokens], strict=False) if before != "_"
        ]
        self.index_i = "j" in bare

    def peek(self, ahead: int = 0) -> str:
        at = self.at + ahead
        return self.tokens[at] if at < len(self.tokens) else ""

    def take(self, token: str = "") -> str:
        found = self.peek()
        if not found or (token and found != token):
            raise Unreadable(f"{found} for {token}")
        self.at += 1
        return found

    def whole(self) -> Any:
        value = self.sum()
        if self.peek() in (r"\over", r"\choose"):
            value = self._over(self.take(), value)
        if self.peek():
            raise Unreadable(self.peek())
        return value

    def sum(self) -> Any:
        terms = [self.product()]
        while (sign := self.peek()) in ("+", "-"):
            self.take()
            term = self.product()
            terms.append(term if sign == "+" else -term)
        value = sympy.Add(*terms)
        if self.peek() in (r"\bmod", r"\mod"):
            self.take()
            value = sympy.Mod(value, self.product())
        return value

    def product(self) -> Any:
        value = self.unary()
        divided = False
        while True:
            token = self.peek()
            if token == "*":
                self.take()
                value, divided = value * self.unary(), False
            elif token == "/":
                self.take()
                value, divided = value / self.unary(), True
            elif self._starts_factor(token):
                # `1/2x` is 1/(2x) for some and x/2 for others.
                if divided:
                    raise Unreadable("a product behind a quotient")
                value = value * self.power()
            else:
                return value

    def _starts_factor(self, token: str) -> bool:
        if not token or token in "+-*/^_!',=<>:%&;)]}" or token in _ENDS:
            return False
        if token[0].isdigit() or token[0] == ".":
            raise Unreadable(f"{token} behind a factor")
        return not (token == "|" and self.bars)

    def unary(self) -> Any:
        if self.peek() == "-":
            self.take()
            return -self.unary()
        if self.peek() == "+":
            self.take()
            return self.unary()
        return self.power()

    def power(self) -> Any:
        value = self.atom()
        while True:
            token = self.peek()
            if token == "!":
                self.take()
                if self.peek() == "!":
                    self.take()
                    value = sympy.factorial2(value)
                else:
                    value = factorial(value)
            elif token == "%":
                self.take()
                value = value / 100
            elif token == "^":
                self.take()
                value = self._raised(value)
            else:
                return value

    def _raised(self, value: Any) -> Any:
        if self.peek() == r"\circ" or (self.peek() == "{" and self.peek(1) == r"\circ"):
            if self.take() == "{":
                self.take()
                self.take("}")
            return value * pi / 180 if self.trig else value
        return power(value, self.exponent())

    def exponent(self) -> Any:
        """A group, or what ASCII writes: `10^-3`, `x^10`, `e^x`."""
        token = self.peek()
        if token in ("-", "+"):
            self.take()
            inner = self.exponent()
            return -inner if token == "-" else inner
        value = self.atom()
        return power(value, self.exponent()) if self.peek() == "^" and self.take() else value

    def group(self, close: str) -> Any:
        """What stands up to `close`, with `\\over` and `\\choose` inside of braces."""
        bars, self.bars = self.bars, 0
        value = self.sum()
        if close == "}" and self.peek() in (r"\over", r"\choose"):
            value = self._over(self.take(), value)
        self.take(close)
        self.bars = bars
        return value

    def _over(self, command: str, above: Any) -> Any:
        below = self.sum()
        return above / below if command == r"\over" else binomial(above, below)

    def argument(self) -> Any:
        r"""An argument of `\frac` or `\sqrt`: a group, or one token (one digit)."""
        if self.peek() == "{":
            self.take()
            return self.group("}")
        token = self.peek()
        if token[:1].isdigit() and len(token) > 1:
            if not token.isdigit():
                raise Unreadable(token)
            self.tokens[self.at : self.at + 1] = [token[0], token[1:]]
        return self.atom(single=True)

    def atom(self, *, single: bool = False) -> Any:
        token = self.take()
        if token[0].isdigit() or (token[0] == "." and len(token) > 1):
            return self._number(token, single)
        if token in "([{":
            value = self.group({"(": ")", "[": "]", "{": "}"}[token])
            if token == "{" and self.peek() == "_":
                raise Unreadable("an index on a group")
            return value
        if token == "|":
            self.bars += 1
            value = self.sum()
            self.take("|")
            self.bars -= 1
            return sympy.Abs(value)
        if token.isalpha():
            return self._named(token, token)
        if token[0] == "\\":
            return self._command(token[1:])
        raise Unreadable(token)

    def _number(self, token: str, single: bool) -> Any:
        value = Rational(token.rstrip("."))
        if single or not value.is_Integer:
            return value
        # A mixed number: `2\frac{3}{4}`, `2 3/4`.
        if self.peek() == r"\frac":
            before = self.at
            self.take()
            above, below = self.argument(), self.argument()
            if above.is_Integer and below.is_Integer and 0 < above < below:
                return value + above / below
            self.at = before
        elif self.peek()[:1].isdigit():
            above, slash, below = self.peek(), self.peek(1), self.peek(2)
            if slash == "/" and above.isdigit() and below.isdigit() and int(above) < int(below):
                self.at += 3
                return value + Rational(int(above), int(below))
            raise Unreadable("two numbers side by side")
        return value

    def _raw(self) -> str:
        """The tokens of a group or of one atom, as a name."""
        if self.peek() != "{":
            return self.take()
        depth, start = 0, self.at
        while True:
            token = self.take()
            depth += (token == "{") - (token == "}")
            if depth == 0:
                return "".join(self.tokens[start + 1 : self.at - 1])

    def _named(self, token: str, name: str) -> Any:
        """A constant, a function or a variable with its index and primes."""
        if name in FUNCTIONS and len(token.lstrip("\\")) > 1:
            return self._function(name)
        if name == "pi":
            return pi
        indexed = False
        while self.peek() in ("_", "'"):
            indexed = True
            name += "'" if self.take() == "'" else "_" + self._raw()
        if not indexed:
            if name == "e":
                return E
            if name == "i" and not self.index_i:
                return I
            if name == "f" and self.peek() == "(":
                self.take()
                return Symbol(f"f({self.group(')')})")
        return Symbol(name)

    def _command(self, name: str) -> Any:
        if name == "frac":
            above = self.argument()
            below = self.argument()
            return above / below
        if name == "binom":
            return binomial(self.argument(), self.argument())
        if name == "pi":
            return pi
        if name == "infty":
            return sympy.oo
        if name in FUNCTIONS:
            return self._function(name)
        if name in _GREEK:
            return self._named(f"\\{name}", name)
        if name in ("lfloor", "lceil"):
            value = self.group(r"\rfloor" if name == "lfloor" else r"\rceil")
            return sympy.floor(value) if name == "lfloor" else sympy.ceiling(value)
        if name in ("angle", "triangle", "overline", "widehat", "overrightarrow"):
            return self._figure(name)
        if name in _MARKS:
            return Symbol(f"{name} {self._raw()}")
        if name == "|":
            value = self.sum()
            self.take("\\|")
            return Symbol(f"norm {value}")
        raise Unreadable(name)

    def _figure(self, name: str) -> Any:
        """`\\angle ABC` and `\\angle CBA` are one angle, `\\overline{AB}` one segment."""
        if self.peek() == "{":
            start = self.at
            letters = self._raw()
        else:
            start, letters = self.at, ""
            while re.fullmatch(r"[A-Z'\d_]|[A-Z]+", self.peek()):
                letters += self.take()
            if not letters and name == "angle":
                letters = self.take()
        if _LETTER_GROUP.fullmatch(letters):
            points = re.findall(r"[A-Z][^A-Z]*", letters)
            if name != "overrightarrow" and points[::-1] < points:
                points.reverse()
            return Symbol(f"{name} {''.join(points)}")
        if name != "overline":
            return Symbol(f"{name} {letters}")
        self.at = start
        return sympy.conjugate(self.argument())

    def _function(self, name: str) -> Any:
        if name == "sqrt":
            return self._root()
        base = exponent = None
        for _ in range(2):
            if self.peek() == "_" and base is None:
                self.take()
                base = self.argument()
            elif self.peek() == "^" and exponent is None:
                self.take()
                exponent = self.exponent()
        if name in _SEVERAL:
            return self._several(name)
        if name == "log":
            call: Callable[..., Any] = partial(_log, base=10 if base is None else base)
        elif name in _CALLS:
            call = _CALLS[name]
        else:
            raise Unreadable(name)
        if exponent == -1 and name in _INVERSES:
            call, exponent = _INVERSES[name], None
        self.trig += name in _TRIG
        argument = self._call_argument()
        self.trig -= name in _TRIG
        value = call(argument)
        return value if exponent is None else power(value, exponent)

    def _call_argument(self) -> Any:
        if self.peek() in ("(", "{", "["):
            close = {"(": ")", "{": "}", "[": "]"}[self.take()]
            value = self.group(close)
            while self.peek() in ("!", "^"):
                if self.take() == "!":
                    value = factorial(value)
                else:  # `\sin(x)^2` has two readings.
                    raise Unreadable("a power behind an argument")
            return value
        if self.peek() == "-":
            self.take()
            return -self._call_argument()
        value = self.power()
        while self._starts_factor(self.peek()):
            token = self.peek()
            if token.lstrip("\\") in FUNCTIONS and token.lstrip("\\") != "sqrt" or token == "(":
                break
            value = value * self.power()
        if self.peek() == "/":  # `\sin x/2` has two readings.
            raise Unreadable("a quotient behind an argument")
        return value

    def _root(self) -> Any:
        degree: Any = Integer(2)
        if self.peek() == "[":
            self.take()
            degree = self.group("]")
        if self.peek() == "(":
            self.take()
            value = self.group(")")
        else:
            value = self.argument()
            if self.peek()[:1].isdigit():  # `\sqrt12`
                raise Unreadable("a number behind a root")
        if degree.is_Integer and int(degree) % 2 and value.is_real and value < 0:
            return -power(-value, 1 / degree)
        return power(value, 1 / degree)

    def _several(self, name: str) -> Any:
        close = {"(": ")", r"\{": r"\}"}.get(self.take())
        if close is None:
            raise Unreadable(name)
        values = [self.sum()]
        while self.peek() == ",":
            self.take()
            values.append(self.sum())
        self.take(close)
        return _SEVERAL[name](*values) if len(values) > 1 else values[0]


_ENDS = frozenset(
    (r"\over", r"\choose", r"\bmod", r"\mod", r"\rfloor", r"\rceil", r"\}", r"\rangle", "\\|")
)


def _letters(token: str) -> list[str]:
    """A run of letters as functions, constants and single variables."""
    if not token.isalpha() or len(token) == 1 or not token.isascii():
        return [token]
    if token in FUNCTIONS or token == "pi":
        return [token]
    if len(token) > 2 and is_word(token) and token.lower() == token:
        raise Unreadable(token)
    return list(token)


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

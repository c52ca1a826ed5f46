r"""One spelling for every way to write an answer: Unicode, Markdown, fonts and spaces of LaTeX.

    "**２√2 cm²**" --spelled--> "2\sqrt{2}\text{cm^2}"
    "$\\boxed{\\text{Yes}.}$" --canonical--> "\\text{Yes}" --plain--> "yes"

Afterwards a text holds formulas and `\text{...}` alone: every word stands in a `\text{}`, letters
outside of one are variables. Nothing here knows what an answer means. All of it is linear.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from pathlib import Path

import yaml

from igrpo_nemo.rewards.units import counted

WORDS = yaml.safe_load((Path(__file__).parent / "spelling.yaml").read_text(encoding="utf-8"))
_TABLE = str.maketrans({c: name for name, chars in WORDS["symbols"].items() for c in chars})
_GREEK_TABLE = str.maketrans(
    {char: f"\\{name} " for name, chars in WORDS["greek"].items() for char in chars}
)
_NAMES = {name: text for text, names in WORDS["names"].items() for name in names.split()}
FUNCTIONS = frozenset(WORDS["functions"].split())
_SHORT_WORDS = frozenset(WORDS["short_words"].split())
_BARE_UNITS = frozenset(WORDS["bare_units"].split())
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺⁽⁾ⁿⁱˣ", "0123456789-+()nix")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₋₊ₙₓᵢₖ", "0123456789-+nxik")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺⁽⁾ⁿⁱˣ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₋₊ₙₓᵢₖ]+")
_VULGAR = re.compile("[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞⅐⅑⅒]")
_ROOT = re.compile(r"([√∛∜])\s*(\d+(?:\.\d+)?|\\[a-z]+ ?|[a-zA-Z])?")
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
_FULL_WIDTH = re.compile("[！-～]")
_MICRO = re.compile("[μµ](?=[mgsLlA](?![a-zA-Z]))")
_CJK = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")

_NOTHING = re.compile(
    r"\\(?:left|right|mleft|mright)(?![a-zA-Z])\.?|\\[bB]igg?[lrm]?(?![a-zA-Z])|\\!|"
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|boldmath|rm|bf|it|tt)(?![a-zA-Z])|"
    r"\\(?:label|tag)\*?\{[^{}]*\}"
)
_DOUBLED = re.compile(
    r"\\(?=\\(?:d?frac|sqrt|pi|text|left|right|cdot|times|boxed|infty|circ|le|ge)(?![a-z]))"
)
_SPACE = re.compile(
    r"\\[,;:> ]|\\(?:quad|qquad|thinspace|enspace|space|newline|par)(?![a-zA-Z])|"
    r"\\[hv](?:space|skip)\*?\{[^{}]*\}|~"
)
_COMMAND = re.compile(r"\\([a-zA-Z]+)\s*")
_FONT = re.compile(
    r"\\(text|textbf|textit|textrm|textnormal|textsf|texttt|textup|mbox|hbox|emph|underline|"
    r"mathrm|mathbf|mathit|mathsf|mathtt|mathnormal|boldsymbol|bm|pmb|operatorname|boxed|fbox|"
    r"mathcal|mathop|ensuremath|color|textcolor|cancel|hat|tilde)\s*\*?\s*(?=\{)"
)
_MATH_FONTS = frozenset(
    "mathbf mathit mathsf mathtt mathnormal boldsymbol bm pmb boxed fbox".split()
)
_MARKDOWN = re.compile(r"^\s*#+\s+|^\s*>\s+|^\s*\*\s+(?=\S)|`+|~~", re.MULTILINE)
_BOLD = re.compile(r"(?<![\w)\]}*])(\*\*|__|\*)(?=\S)([^*]*[^*\s])\1(?![\w(*])")
_GROUPED = re.compile(r"(?<=\d)(?:\{,\}|,?\\!|\\,|,\\,)(?=\d{3}(?!\d))")
_SPACED = re.compile(r"(?<![\d.,])([1-9]\d{0,2})((?:[ ]\d{3})+)(?![\d])")
_RUN = re.compile(r"(?<![\\a-zA-Z_])[A-Za-z][A-Za-z']*(?:\.[A-Za-z]\.?)?(?![a-zA-Z])")
_HYPHENED = re.compile(r"(?<![\\a-zA-Z_])[a-zA-Z]+-([a-z]{4,})(?![a-zA-Z(])")
_SPEED = re.compile(
    r"(?<=[\d }])(km|cm|mm|mi|m|ft|kg|mg|g|L|l|rad|miles?)\s*/\s*"
    r"(hr|hour|h|sec|second|s|min|minute|day|kg|g|L|mL|cm|m)(\^\{?-?\d\}?)?(?![a-zA-Z])"
)
_TEXTS = re.compile(
    r"(\\text\{(?:[^{}]|\{[^{}]*\})*\}|\\(?:begin|end|hat|mathbb|operatorname)\{[^{}]*\})"
)
_ORDINAL = re.compile(r"(?<=\d)\s*\^\s*\{?\s*(?:\\text\{)?\s*(?:th|st|nd|rd)\s*\}?\s*\}?(?![a-z])")
_OPTION = re.compile(
    r"(?:(?i:(?:the )?(?:correct |final )?(?:option|choice|answer)(?: is)?:?\s+))?"
    r"(\([A-Z]\)\.?|[A-Z](?:[).:](?=\s|$)|$))(?!\s*(?:and\b|or\b|,))\s*([^\d]*)"
)
_TIME = re.compile(r"\d{1,2}:\d{2} ?[apAP]\.?[mM]\.?")
_VOWELS = frozenset("aeiouAEIOU")

_ENVIRONMENT = re.compile(
    r"\\begin\{(aligned|align|align\*|equation|equation\*|gather|gathered|gather\*|split|displaymath|math|"
    r"cases|rcases|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}"
)
_SAID = re.compile(
    r"^(?:(?:so|thus|hence|therefore),? )?(?:the |my )?(?:final |correct )?"
    r"(?:answer|result)(?: is)?:? "
)
_SYNONYMS = {
    "dne": "does not exist",
    "t": "true",
    "none of the above": "none of these",
    "infinitely many solutions": "infinitely many",
    "infinite": "infinitely many",
}


@lru_cache(maxsize=32_768)
def canonical(text: str) -> str:
    """The text in one spelling, unwrapped."""
    return unwrapped(spelled(_dollars(text)))


@lru_cache(maxsize=32_768)
def plain(text: str) -> str:
    """A spelled text as it is compared: no case in words, no white space in formulas."""
    words = re.findall(r"\\text\{((?:[^{}]|\{[^{}]*\})*)\}", text)
    if words and not re.sub(r"\\text\{(?:[^{}]|\{[^{}]*\})*\}", "", text).strip(" .,"):
        bare = re.sub(r"\b([ap])\.?\s?m\b\.?", r"\1m", " ".join(words), flags=re.IGNORECASE)
        bare = " ".join(bare.split()).strip(" .,;:!\"'").casefold()
        bare = _SAID.sub("", bare) or bare
        return _SYNONYMS.get(bare, bare)
    text = re.sub(r"\\text\{((?:[^{}]|\{[^{}]*\})*)\}", lambda m: f'"{m[1].casefold()}"', text)
    text = re.sub(r"(?<![a-zA-Z0-9])\s+|\s+(?![a-zA-Z0-9])", "", text).rstrip(".,;")
    return re.sub(r"^(?:[,;]|\.(?!\d))+", "", text)  # a point before digits is a decimal one


def _dollars(text: str) -> str:
    r"""Dollar signs as a currency where they are one; as the bounds of formulas they go."""
    text = text.replace("$$", "$")
    text = re.sub(r"(?:\bUSD?\s*|\b[AC]\s*)?\\\$(?=\s*[\d.])", r"\\text{usd} ", text)
    text = re.sub(r"\bUS\s*\$(?=\d)", r"\\text{usd} ", text).replace(r"\$", r"\text{usd}")
    if text.count("$") % 2:
        text = re.sub(r"\$(?=\s*[\d.])", r"\\text{usd} ", text)
    text = re.sub(r"\$(?=\s*[.,]?\s*$)", "", text) if text.count("$") % 2 else text
    # Formulas side by side are several, never a product.
    parts = text.split("$")
    for index in range(2, len(parts) - 1, 2):
        parts[index] = r" \gap " if not parts[index].strip() else f" {parts[index]} "
    text = " ".join(parts)
    return re.sub(r"\\\)\s*\\\(|\\\]\s*\\\[", r" \\gap ", text)


def unwrapped(text: str) -> str:
    """Without quotes, stops, and environments that stand around all of it."""
    before = None
    while before != text:
        before = text
        text = re.sub(r"\\[()\[\]]", " ", text).strip()
        text = text.strip('"`').strip()
        while text.endswith((".", ",", ";", ":")) and not text.endswith(r"\,"):
            text = text[:-1].rstrip()
        if text.startswith("'") and text.endswith("'") and len(text) > 2:
            text = text[1:-1]
        if text.startswith("{") and brace_end(text, 0) == len(text) and r"\over" not in text:
            text = text[1:-1]
        environment = _ENVIRONMENT.fullmatch(text)
        if environment is not None and environment[1] != "array":
            text = _rows(environment[1], environment[2])
    return " ".join(text.split())


def _rows(name: str, body: str) -> str:
    rows = [row.strip().strip(",") for row in body.split(r"\cr") if row.strip()]
    if "cases" in name and "&" in body:
        return " ; ".join(rows) + r" \piecewise"
    rows = [row.replace("&", "") for row in rows]
    chain = all(row.lstrip().startswith(("=", r"\approx", r"\le", "<")) for row in rows[1:])
    return (" " if chain else ", ").join(rows)


def spelled(text: str) -> str:
    """The text in the one spelling. White space is single; no fonts, sizes or spaces of LaTeX."""
    if not text.isascii():
        text = _unicode(text)
    text = _DOUBLED.sub("", text) if "\\begin" not in text else text
    text = re.sub(r"^\s*_([^_]+)_\s*$", r"\1", text.replace("\\\\", "\\cr "))
    text = _BOLD.sub(r" \2 ", _BOLD.sub(r" \2 ", _MARKDOWN.sub(" ", text))).replace("**", "^")
    text = _GROUPED.sub("", text)
    text = _NOTHING.sub("", text)
    text = _SPACE.sub(" ", text)
    text = _COMMAND.sub(_name, text)
    text = _ORDINAL.sub("", _fonts(text))
    text = re.sub(r"\.\.\.+", r"\\ldots ", text)
    text = re.sub(r"(?<![\d)])!=", r"\\ne ", text).replace("<=", r"\le ").replace(">=", r"\ge ")
    text = text.replace(r"\%", "%").replace(r"\_", "_").replace(r"\&", r"\text{and}")
    text = re.sub(r"(?<=\d)\s*x\s*(?=10\s*\^)|(?<=\d) x (?=\d)", "*", text)
    text = _SPACED.sub(lambda m: m[1] + m[2].replace(" ", ""), " ".join(text.split()))
    return " ".join(_words(text).split())


def _unicode(text: str) -> str:
    text = _MICRO.sub("u", text)
    text = _FULL_WIDTH.sub(lambda m: chr(ord(m[0]) - 0xFEE0), text)
    text = re.sub("[\u00a0\u2000-\u200a\u202f\u205f\u3000]", " ", text)
    text = _RAISED.sub(lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = _LOWERED.sub(lambda m: "_{" + m[0].translate(_SUBSCRIPTS) + "}", text)
    text = _VULGAR.sub(
        lambda m: "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", m[0]).split("⁄")), text
    )
    text = text.translate(_GREEK_TABLE)
    text = _ROOT.sub(lambda m: _ROOTS[m[1]] + ("{" + m[2] + "}" if m[2] else ""), text)
    text = text.translate(_TABLE)
    text = _CJK.sub(lambda m: f"\\text{{{m[0]}}}", text)
    # Ticks, emoji and other pictures say nothing.
    return "".join(c if c.isascii() or unicodedata.category(c)[0] != "S" else " " for c in text)


def _name(match: re.Match[str]) -> str:
    known = _NAMES.get(match[1])
    return match[0] if known is None else known


def _fonts(text: str) -> str:
    r"""Fonts without effect; words in `\text{...}` of their own."""
    out: list[str] = []
    at = 0
    for _ in range(200):
        match = _FONT.search(text, at)
        if match is None:
            break
        end = brace_end(text, match.end())
        if end > len(text):
            break
        content = text[match.end() + 1 : end - 1]
        out.append(text[at : match.start()])
        at = end
        if match[1] in ("color", "textcolor", "hat", "tilde"):
            out.append("" if "color" in match[1] else f"\\{match[1]}{{{content}}}")
            continue
        content = _fonts(content)
        if match[1] in ("mathbf", "bm", "boldsymbol") and content in ("i", "j", "k"):
            out.append(f"\\hat{{{content}}}")
        elif match[1] in _MATH_FONTS:
            out.append(content if len(content) < 3 or not content.isalpha() else _worded(content))
        elif match[1] in ("mathrm", "operatorname", "mathop") and content in FUNCTIONS:
            out.append(f"\\{content} ")
        elif match[1] == "mathrm" and content in ("e", "i"):
            out.append(content)
        elif match[1] == "mathcal":
            out.append(content)
        else:
            behind = text[: match.start()].rstrip().endswith(tuple("0123456789})"))
            out.append(
                f"\\text{{{content.strip()}}}"
                if behind and len(content.strip()) == 1
                else _worded(content)
            )
    out.append(text[at:])
    return "".join(out)


def _worded(content: str) -> str:
    r"""The content of a `\text{...}`: its words in a text, its numbers and formulas outside."""
    bare = content.strip()
    if not re.search("[A-Za-z\u3040-\ud7af]", bare) or "$" in bare or "\\" in bare:
        return f" {bare.replace('$', '')} "
    if re.fullmatch(r"\(?[A-Z]\)?\.?", bare):
        return f" {bare} "
    if _TIME.fullmatch(bare):
        return f"\\text{{{bare}}}"
    if (choice := _OPTION.fullmatch(bare)) is not None:
        rest = f" \\text{{{choice[2]}}}" if choice[2] else ""
        return f" {choice[1]}{rest} "
    # Numbers inside a text are formulas as well; powers belong to units (`m s^{-1}`).
    pieces = re.split(r"((?<![\^\-\dA-Za-z{])-?\d[\d.,:]*(?![A-Za-z\d])|\([A-Z]\))", bare)
    return " ".join(
        f"\\text{{{piece.strip()}}}" if i % 2 == 0 else piece.strip()
        for i, piece in enumerate(pieces)
        if piece.strip()
    )


def _words(text: str) -> str:
    r"""Bare words as `\text{...}`; products of letters stay."""
    parts = _TEXTS.split(text)
    whole = text.strip()
    for index in range(0, len(parts), 2):
        parts[index] = re.sub(r"(?<![A-Za-z\\])I (?=[a-z]{3})", r"\\text{I} ", parts[index])
        parts[index] = _HYPHENED.sub(
            lambda m: f"\\text{{{m[0]}}}" if is_word(m[1]) else m[0], parts[index]
        )
        parts[index] = _SPEED.sub(r"\\text{\1/\2\3}", parts[index])
    parts = _TEXTS.split("".join(parts))
    for index in range(0, len(parts), 2):
        if parts[index]:
            parts[index] = _RUN.sub(lambda m: _as_word(m, whole), parts[index])
    text = "".join(parts)
    # Words side by side are one text; a power behind a unit belongs to it.
    text = re.sub(r"(\\text\{[^{}]*)\}\s*\^\s*(?:\{(-?\d)\}|(-?\d))", r"\1^\2\3}", text)
    for _ in range(3):
        text = re.sub(
            r"\\text\{((?:[^{}]|\{[^{}]*\})*)\}\s*(/?)\s*\\text\{", r"\\text{\1 \2 ", text
        )
    text = re.sub(
        r"\\frac\s*\{\\text\{([^{}]*)\}\}\s*\{\\text\{([^{}]*)\}\}", r"\\text{\1/\2}", text
    )
    return text.replace(" / ", "/")


def _as_word(match: re.Match[str], whole: str) -> str:
    word = match[0]
    if is_word(word, alone=whole == word):
        before, after = match.string[: match.start()].rstrip(" "), match.string[match.end() :]
        # Short words stand between words and numbers, not inside a formula (`u + at`).
        formula = before.endswith(tuple("+-*/=^(<>")) or after.lstrip(" ").startswith(
            tuple("+*/=_^")
        )
        if not (formula and word.lower() in _SHORT_WORDS) and not (
            after.startswith("(") and len(word) < 5
        ):
            return f"\\text{{{word}}}"
    return word


def is_word(run: str, *, alone: bool = False) -> bool:
    """Whether a run of letters is a word (or a code such as `TTF`) rather than a product."""
    short = run in _SHORT_WORDS or (run.istitle() and run.lower() in _SHORT_WORDS)
    if run in _BARE_UNITS or short or ("." in run and len(run) > 2):
        return True
    if len(run) < 2 or run in FUNCTIONS or run in ("pi", "infty"):
        return False
    if alone and run != run.lower():
        return True  # Orders and names: `BCA`, `Amy`, `AB`.
    if len(run) == 2:
        return False
    if len(run) > 3 and counted(run):
        return True
    if len(set(run)) < len(run) and alone:
        return True
    return any(char in _VOWELS for char in run[1:] if len(run) > 3 or alone) or len(run) > 4


def brace_end(text: str, start: int) -> int:
    """Where the group that opens at `start` ends (behind its brace); the text's end without one."""
    depth = 0
    index = start
    while index < len(text):
        if text[index] == "\\":
            index += 2
            continue
        depth += (text[index] == "{") - (text[index] == "}")
        index += 1
        if depth == 0:
            return index
    return len(text) + 1


def split_top(text: str, separators: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The parts between separators that stand in no bracket, and those separators."""
    parts: list[str] = []
    found: list[str] = []
    depth = start = index = 0
    while index < len(text):
        char = text[index]
        hit = (
            next((s for s in separators if text.startswith(s, index)), None) if depth == 0 else None
        )
        if hit is not None and not (
            hit[0] == "\\" and text[index + len(hit) : index + len(hit) + 1].isalpha()
        ):
            parts.append(text[start:index].strip())
            found.append(hit)
            index += len(hit)
            start = index
            continue
        if char == "\\" and index + 1 < len(text):
            escaped = text[index + 1]
            depth += (escaped == "{") - (escaped == "}")
            for name, change in (
                (r"\langle", 1),
                (r"\rangle", -1),
                (r"\lfloor", 1),
                (r"\rfloor", -1),
            ):
                depth += change if text.startswith(name, index) else 0
            index += 2
            continue
        depth += (char in "([{") - (char in ")]}")
        depth = max(depth, 0)
        index += 1
    return [*parts, text[start:].strip()], found


def balanced(text: str) -> bool:
    """Whether every brace is closed; escaped ones are not counted."""
    return brace_end(f"{{{text}}}", 0) == len(text) + 2

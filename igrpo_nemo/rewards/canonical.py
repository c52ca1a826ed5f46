r"""A text as it is compared: spelled, and without what stands around all of it.

"$\\boxed{\\text{Yes}.}$" --canonical--> "\\text{Yes}" --plain--> "yes"
"""

from __future__ import annotations

import re
from functools import lru_cache

from igrpo_nemo.rewards.brackets import brace_end
from igrpo_nemo.rewards.spelling import spelled

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
    return re.sub(r"(?<![a-zA-Z0-9])\s+|\s+(?![a-zA-Z0-9])", "", text).strip(".,;")


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

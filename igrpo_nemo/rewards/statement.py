r"""From what a model says to what it states: cues, fillers, hedges. Works on spelled text.

"\text{the answer is} 5 \text{and not} 1" --stated--> "5"
"\text{either} 4 \lor 5" --stated--> None: no answer is read from prose that says several things
"""

from __future__ import annotations

import re

from igrpo_nemo.rewards.units import WORDS

_TEXT = re.compile(r"\\text\{((?:[^{}]|\{[^{}]*\})*)\}")
_CUE = re.compile(
    r"\\text\{(?:[^{}]*\b)?(?:answer|result|solution|value|conclusion|ans|答案|答え|답)"
    r"(?:[^{}]*?\b(?:is|are|be|equals|equal to|was|becomes)|是|为|為|は)?(?:[^{}]*)\}\s*[:=]?\s*"
)
_LEADING = re.compile(r"^\\text\{([^{}]*\b(?:is|are|equals|equal to|get|have))\}\s*:?\s*(?=\S)")
_LABEL = re.compile(r"^\\text\{([^{}]*)\}(?:\s*\d+\s*)?\s*:\s*(?=\S)")
_ASIDE = re.compile(r"\s*\((?=[^()]*\\text\{(?!mod))[^()]*\)$")
_NOT_THAT = re.compile(
    r"\s*(?:,|\\land|\\text\{(?:and|but|and not|but not|rather than|,? ?not)\})\s*"
    r"(?:\\text\{not\}\s*)?[^\\,]*$"
)
_DOMAIN = re.compile(
    r"[,;\s]*(?:\\text\{(?:where|for|for all|with|and|for any|for some|for every|any|and where)\})?"
    r"\s*\(?\s*(?:\\text\{(?:where|for|with|for all)\})?\s*"
    r"(?<![a-zA-Z\\])[a-zA-Z](?:,\s*[a-zA-Z])*\s*\\in\s*"
    r"\\mathbb\s*\{?Z\}?\s*\)?$"
)
_IN_FRONT = re.compile(
    r"([^\\,]*?)\s*\\text\{(?:[a-z]+ )?"
    r"(?:of (?:the|these|those|all)|out of|is (?:the|our|a|an))\b"
)
_TURNING = re.compile(
    rf"\b(?:{'|'.join([*WORDS['turning'].split(), *WORDS['magnitudes']])})\b|[不非没或]"
)
# One of these makes words before a number a sentence; others are a name (`May 5`, `Team 3`).
_SENTENCE = re.compile(rf"\b(?:{'|'.join(WORDS['sentence'].split())})\b|答案|是|为|は")
_CONNECTIVE = re.compile(
    r"(?:(?:therefore|hence|thus|so|then|and)(?: we (?:get|have|find|obtain))?|we (?:get|have)|"
    r"finally|so on|and so on|in conclusion|in total|altogether|as required|q\.?e\.?d\.?|etc|"
    r"i hope it is correct|respectively|done|as desired)\.?"
)


def turned(words: str) -> bool:
    return _TURNING.search(words.casefold()) is not None


def _hedged(aside: str) -> bool:
    words = _TEXT.sub(r"\1", aside)
    return turned(words) or re.search(r"\b(?:or|and)\b", words) is not None


def stated(text: str) -> str | None:
    """The part of a spelled text that is the answer; None where it says something else, or several.

    A text without words is itself. Units and nouns behind a number stay.
    """
    text = _DOMAIN.sub("", text) if "mathbb" in text and _DOMAIN.sub("", text) else text
    if r"\text{" not in text:
        return text
    text = re.sub(
        r"\\text\{((?:[^{}]* )?)(?:minus|negative)\}\s*(?=[\d\\(.])", r"\\text{\1} -", text
    )
    text = text.replace(r"\text{}", " ").strip()
    cues = list(_CUE.finditer(text))
    if cues and cues[-1].end() < len(text):
        if turned(_TEXT.sub(r"\1", cues[-1].group())):
            return None
        text = text[cues[-1].end() :]
        rest = _NOT_THAT.sub("", text) if r"\text{" in text and "not" in text else text
        text = rest or text
    leading = _LEADING.match(text)
    if leading is not None and not turned(leading[1]):
        text = text[leading.end() :]
    label = _LABEL.match(text)
    if label is not None and not turned(label[1]):
        text = text[label.end() :]
    aside = _ASIDE.search(text)
    if aside is not None and aside.start() and not _hedged(aside.group()):
        text = text[: aside.start()]
    text = _without_connectives(text)
    return _of_or_is(text)


def _without_connectives(text: str) -> str:
    first = _TEXT.match(text)
    if first is not None and _only_connective(first.group()):
        text = text[first.end() :].lstrip(" ,:") or text
    clauses = re.split(r"\s*,\s*", text)
    if len(clauses) > 1:
        kept = [c for c in clauses if not _only_connective(c)]
        text = ", ".join(kept) if kept and len(kept) < len(clauses) else text
    return text


def _only_connective(clause: str) -> bool:
    words = _TEXT.fullmatch(clause.strip(" ."))
    return words is not None and _CONNECTIVE.fullmatch(words[1].strip().casefold()) is not None


def _of_or_is(text: str) -> str:
    """`5 of the 8 people`, `12 is the total of 5 and 7`: the number in front."""
    match = _IN_FRONT.match(text)
    if match is None or not match[1] or not re.search(r"\d", match[1]):
        return text
    words = " ".join(_TEXT.findall(text))
    return text if turned(re.sub(r"\b(?:total|sum) of\b.*", "", words)) else match[1]


def parted(text: str) -> str:
    r"""`\text{and}` and `\text{or}` as `\land` and `\lor`, also inside of longer texts."""
    if not re.search(r"\d|\\[a-z]+(?<!\\text)|[A-Za-z]", _TEXT.sub("", text)):
        return text

    def split(match: re.Match[str]) -> str:
        pieces = re.split(r"\s*\b(and|or)\b\s*", match[1])
        if len(pieces) == 1:
            return match[0]
        out = [
            {"and": r" \land ", "or": r" \lor "}.get(piece, f"\\text{{{piece}}}" if piece else "")
            for piece in pieces
        ]
        return "".join(out)

    return _TEXT.sub(split, text)


def said_once(text: str) -> str | None:
    r"""The one formula in prose, with its unit behind it: `\text{there are} 12 \text{ways}`."""
    pieces = re.split(r"\\text\{((?:[^{}]|\{[^{}]*\})*)\}", text)
    formulas = [piece for piece in pieces[0::2] if piece.strip(" .,:;!")]
    words = " ".join(pieces[1::2])
    if len(formulas) != 1 or pieces[0].strip() or turned(words):
        return None
    if _SENTENCE.search(pieces[1].casefold()) is None:
        return None
    return formulas[0].strip(" .,:;")

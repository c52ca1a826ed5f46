"""What the tags of a completion hold: the answer, and whether the format is the prompt's.

    completion --visible_parts--> what the reader is told --extract_answer--> answer | None

The text after the thinking, then `<answer>`, then a box. A chat template may end the prompt with
`<think>`; then the completion need not open it again (`thinking_open`). Every function is linear in
its input and raises nothing, so it may run in the training process on text nobody has looked at.
"""

from __future__ import annotations

import re
from enum import StrEnum

from igrpo_nemo.types import Score, Target


class AnswerFormat(StrEnum):
    """Where an answer is looked for."""

    TAGS = "tags"
    """The last complete `<answer>...</answer>`."""
    BOXED = "boxed"
    r"""The last balanced `\boxed{...}` (or `\fbox`), or a box without braces."""
    ANY = "any"
    """Tags first; where there are none, the box."""


_THINK_TAG = re.compile(r"</?think>")
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
_BRACE = re.compile(r"\s*\{")
_SIMPLE_BOX = re.compile(r"\\(?:boxed|fbox)\{([^{}\\]*)\}")
# An escaped character (`\{` is a set brace, not a group), a brace, or the start of a box.
_BOX_TOKEN = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])|\\.|[{}]", re.DOTALL)
# What `\boxed 5` and `\boxed\frac12` put in the box: a command with its groups, or a bare token.
_BRACELESS = re.compile(
    r"\s*(-?\\[a-zA-Z]+(?:\s*\{[^{}]{0,200}\}){1,2}|-?\\[a-zA-Z]+\s*\d*|[^\s$\\{}]+)"
)
# `12m` is plain text for 12 meters; in a formula (a box, `$...$`) the letter is a variable.
_PLAIN_UNIT = re.compile(r"([^A-Za-z\\$]*\d)\s?([mgshLl])([²³]|\^[23])?\.?")
_SEPARATOR = re.compile(r"\b(?:and|or)\b|[,;]")
# What leads from one box to a later one that replaces it.
_NEXT_STEP = re.compile(r"\b(?:then|so|hence|thus|therefore|gives|becomes|wait|actually|not)\b")
# A box that matters stands near the end; looking further back only costs time on hostile text.
_BOX_WINDOW_CHARS = 200_000


def visible_parts(text: str, *, thinking_open: bool = False) -> list[str]:
    """The parts of a completion outside its thinking.

    A `</think>` that nothing opened closes a part which the chat template opened. A part that is
    never closed hides everything after it: an answer inside the thinking does not count.
    """
    tags = list(_THINK_TAG.finditer(text)) if "think>" in text else []
    if not tags:
        return [] if thinking_open else [text]
    inside = thinking_open or tags[0].group() == "</think>"
    parts: list[str] = []
    start = 0
    for tag in tags:
        opens = tag.group() == "<think>"
        if not inside:
            # Either the thinking opens again, or a stray `</think>` is skipped over.
            parts.append(text[start : tag.start()])
        elif opens:
            continue  # `<think>` inside the thinking is text of the thinking.
        inside = opens
        start = tag.end()
    if not inside:
        parts.append(text[start:])
    return parts


def last_tagged(text: str) -> str | None:
    """The content of the last complete `<answer>...</answer>`, stripped; None without one.

    An `<answer>` that was cut off does not count: its number may go on.
    """
    close = text.rfind("</answer>")
    if close < 0:
        return None
    start = text.rfind("<answer>", 0, close)
    if start < 0:
        return None
    return text[start + len("<answer>") : text.find("</answer>", start)].strip()


def last_boxed(text: str, *, truncated: bool = False, several: bool = False) -> str | None:
    r"""The content of the last balanced `\boxed{...}`, stripped; None without one.

    A box that was cut off is passed over for the one before it. `\boxed 5` and `\boxed\frac{1}{2}`
    are boxes without braces; such a one at the very end of a truncated text may go on, so it does
    not count. With `several`, boxes that stand together (`\boxed{1} and \boxed{2}`) are one answer,
    joined by commas, by math-verify's own rule.
    """
    last = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if last < 0:
        return None
    if not several and (simple := _SIMPLE_BOX.match(text, last)) is not None:
        return simple[1].strip()
    # Nearly always the last box is whole: scan from there, and from the first one otherwise.
    spans = [] if several else _closed_boxes(text, last, truncated)
    if not spans:
        text = text[-_BOX_WINDOW_CHARS:]
        first = _BOX.search(text)
        spans = _closed_boxes(text, first.start(), truncated) if first else []
    if not spans:
        return None
    spans.sort()
    if several:
        return ",".join(_together(text, spans))
    return text[slice(*spans[-1])].strip()


def _closed_boxes(text: str, start: int, truncated: bool) -> list[tuple[int, int]]:
    """One pass over `text` from `start`: the spans of the contents of all closed boxes."""
    opened: list[int | None] = []  # per open brace: where its box's content starts, or None
    spans: list[tuple[int, int]] = []
    skip_to = start
    for token in _BOX_TOKEN.finditer(text, start):
        if token.start() < skip_to:
            continue
        kind = token.group()
        if kind == "{":
            opened.append(None)
        elif kind == "}":
            content = opened.pop() if opened else None
            if content is not None:
                spans.append((content, token.start()))
        elif kind.startswith(("\\boxed", "\\fbox")):
            if (brace := _BRACE.match(text, token.end())) is not None:
                opened.append(brace.end())
                skip_to = brace.end()
            elif (bare := _BRACELESS.match(text, token.end())) is not None:
                if not truncated or bare.end() < len(text):
                    spans.append(bare.span(1))
    return spans


def _together(text: str, spans: list[tuple[int, int]]) -> list[str]:
    """The contents of the last boxes that stand together, at most eight, in order of writing."""
    contents = [text[slice(*spans[-1])].strip()]
    for (start, end), (next_start, _) in zip(spans[-2:-9:-1], spans[:-8:-1], strict=False):
        between = text[end:next_start]
        content = text[start:end].strip()
        near = len(between) < 18 or (
            len(between) < 78 and content != contents[-1] and _SEPARATOR.search(between)
        )
        if end > next_start or not near or _NEXT_STEP.search(between):
            break
        if content != contents[-1]:
            contents.append(content)
    return contents[::-1]


def extract_answer(
    text: str,
    answer_format: AnswerFormat = AnswerFormat.ANY,
    *,
    thinking_open: bool = False,
    truncated: bool = False,
    several: bool = False,
    plain_units: bool = False,
) -> str | None:
    r"""The answer that a completion gives, or None.

    An `<answer>` that holds a box gives the box's content; an empty one is no answer, and the box
    outside is looked for (format `any`). `several` as in `last_boxed`. With `plain_units` (for a
    reference without variables) a letter behind a number in tags is a unit: `12m`.
    """
    parts = visible_parts(text, thinking_open=thinking_open)
    if answer_format is not AnswerFormat.BOXED:
        found = (last_tagged(part) for part in reversed(parts))  # none reaches over a thinking tag
        if tagged := next((each for each in found if each is not None), None):
            if boxed := last_boxed(tagged, several=several):
                return boxed
            unit = _PLAIN_UNIT.fullmatch(tagged) if plain_units and len(tagged) < 40 else None
            return f"{unit[1]}\\text{{ {unit[2]}}}{unit[3] or ''}" if unit else tagged
        if answer_format is AnswerFormat.TAGS:
            return None
    return last_boxed("\n".join(parts), truncated=truncated, several=several) or None


_COMMAND = re.compile(r"\\[a-zA-Z]+")
_WORD = re.compile(r"[^\W\d_]+")
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_reward(text: str, *, thinking_open: bool = False) -> float:
    """1.0 where the completion has the full structure of the system prompt, else 0.0.

    Each tag occurs once, in order; the thinking and the answer are not empty; nothing but white
    space stands before, between and after the parts. Linear in the text.
    """
    body = text.strip()
    if body.startswith("<think>"):
        body = body.removeprefix("<think>")
    elif not thinking_open:
        return 0.0
    thinking, closed, rest = body.partition("</think>")
    rest = rest.strip()
    if not closed or not rest.startswith("<answer>") or not rest.endswith("</answer>"):
        return 0.0
    answer = rest[len("<answer>") : -len("</answer>")]
    if not thinking.strip() or not answer.strip():
        return 0.0
    return 0.0 if any(tag in part for part in (thinking, answer) for tag in _TAGS) else 1.0


def target_score(
    target: Target, text: str, thinking_open: bool = False, truncated: bool = False
) -> Score:
    r"""`target.reward` where the answer begins with `target.word`, 0 otherwise.

    The answer stands where a solution's does (`<answer>`, else `\boxed{}`). `accuracy` is 1 for
    the right word; the reason is `said_<word>`, or `no_verdict` for none of `target.among`.
    """
    answer = extract_answer(text, thinking_open=thinking_open, truncated=truncated) or ""
    first = _WORD.search(_COMMAND.sub(" ", answer))
    said = first.group().lower() if first else ""
    right = said == target.word
    reason = f"said_{said}" if said in target.among else "no_verdict"
    return Score(target.reward if right else 0.0, {"accuracy": float(right)}, reason)

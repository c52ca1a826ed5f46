r"""What stands in a column: the question and the reference answer of a row, as text.

    question: a text | a chat of one user message (verl, TRL)
    answer:   a text, cut to its last `<answer>`, last `\boxed{}` or what follows the last `####`
              | a number | a list of one | an object with one of `ANSWER_KEYS` (verl's reward_model)

A dot in a column's name leads into an object: `reward_model.ground_truth`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from igrpo_nemo.rewards.extract import extract_answer

QUESTION_KEYS = ("problem", "question", "input", "prompt", "query", "messages")
ANSWER_KEYS = (
    "answer", "expected_answer", "output", "target", "gt", "ground_truth", "solution",
    "reward_model",
)  # fmt: skip

_HAS_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Unusable(ValueError):
    """A value that is no question, or no reference; `reason` is the name that it is counted by."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def value_at(row: Mapping[str, Any], key: str) -> Any:
    """The value of a column; None where the row has none."""
    first, dot, rest = key.partition(".")
    if key in row or not dot:
        return row.get(key)
    inside = row.get(first)
    return value_at(inside, rest) if isinstance(inside, Mapping) else None


def question_text(value: Any) -> str:
    """The question in a column's value. Raises `Unusable` where there is none.

    Of a chat it is the user's one message. A system message is left out, `igrpo.prompt.system`
    stands in its place; a chat that goes on is no single question.
    """
    if isinstance(value, list):
        value = _user_message(value)
    if not isinstance(value, str) or not value.strip():
        raise Unusable("no_question")
    return _unicode(value.strip())


def _user_message(chat: list[Any]) -> Any:
    turns = [turn for turn in chat if not isinstance(turn, dict) or turn.get("role") != "system"]
    if len(turns) != 1 or not isinstance(turns[0], dict) or turns[0].get("role") != "user":
        raise Unusable("question_not_one_message")
    content = turns[0].get("content")
    if not isinstance(content, list):
        return content
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise Unusable("question_not_text")
    return "\n".join(map(str, texts))


def reference_answer(value: Any, *, solution: bool = False) -> str:
    """The reference answer in a column's value. Raises `Unusable` where there is none.

    A number is written in full, without exponent or a `.0`. A `solution` without any mark has no
    answer; boxes that stand together in one are all of its answer.
    """
    while isinstance(value, list | dict):
        value = _inner(value)
    if value is None or isinstance(value, bool):
        raise Unusable("no_answer")
    if isinstance(value, float):
        return _plain(value)
    text = _unicode(str(value).strip())
    answer = extract_answer(text, several=True)
    if answer is None:
        if _HAS_BOX.search(text):  # An empty box, or one that never closes.
            answer = ""
        elif "####" in text:
            answer = text.rpartition("####")[2].strip()
        else:
            answer = "" if solution else text
    if not answer:
        raise Unusable("no_answer")
    return answer


def _inner(value: list[Any] | dict[str, Any]) -> Any:
    if isinstance(value, list):
        if len(value) > 1:
            raise Unusable("several_answers")
        return value[0] if value else None
    known = [value[key] for key in (*ANSWER_KEYS, "value") if key in value]
    if len(known) != 1:
        raise Unusable("answer_not_text")
    return known[0]


def _plain(value: float) -> str:
    if not math.isfinite(value):
        raise Unusable("no_reference")
    text = format(Decimal(repr(value)), "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _unicode(text: str) -> str:
    if _SURROGATE.search(text):
        raise Unusable("not_unicode")
    return text

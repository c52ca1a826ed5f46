"""What is scored without mathematics: the format, and an answer that must be one word.

A chat template may end the prompt with `<think>`; then the completion need not open it again
(`thinking_open`). White space may stand around and between the two parts.
"""

from __future__ import annotations

import re

from igrpo_nemo.rewards.extract import extract_answer
from igrpo_nemo.types import Score, Target

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
    target: Target, text: str, *, thinking_open: bool = False, truncated: bool = False
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

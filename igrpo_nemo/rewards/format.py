"""The format reward: `<think>...</think><answer>...</answer>` and nothing else.

A chat template may end the prompt with `<think>`; then the completion need not open it again
(`thinking_open`). White space may stand around and between the two parts.
"""

from __future__ import annotations

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

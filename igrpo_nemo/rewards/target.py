"""The score of a completion that must answer with one word, such as a verdict: yes or no."""

from __future__ import annotations

import re

from igrpo_nemo.rewards.extract import extract_answer
from igrpo_nemo.types import Score, Target

_COMMAND = re.compile(r"\\[a-zA-Z]+")
_WORD = re.compile(r"[^\W\d_]+")


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

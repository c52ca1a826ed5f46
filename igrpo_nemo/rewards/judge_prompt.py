"""What the judge is asked, and how its reply is read.

The completion is data: it stands between delimiters that hold a digest of the completion itself,
so no completion can contain its own closing delimiter, and chat control tokens in it are broken
up. Whatever it says to the judge, the prompt's structure is the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from igrpo_nemo.types import Problem

TEXTS: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parent / "judge.yaml").read_text(encoding="utf-8")
)
"""What is asked, and what is said where the judge refuses."""

# `<|im_start|>`, `<|eot_id|>`, `[INST]`, `<s>`: what servers may read as a turn's end.
_CONTROL = re.compile(r"<(?=\||/?s>|/?(?:start|end)_of_turn)|\[(?=/?INST\])|<(?=｜)")
_ZERO_WIDTH_SPACE = "\u200b"


def judge_messages(problem: Problem, completion: str) -> list[dict[str, str]]:
    """The chat messages that ask for one grade; equal input gives equal messages."""
    parts = {
        "problem": problem.question,
        "reference": problem.answer,
        "solution": completion,
    }
    digest = hashlib.sha256(json.dumps(list(parts.values())).encode()).hexdigest()[:24]
    body = "\n".join(
        f"<{name}-{digest}>\n{as_data(text)}\n</{name}-{digest}>" for name, text in parts.items()
    )
    return [
        {"role": "system", "content": TEXTS["system"]},
        {"role": "user", "content": f"{body}\n{TEXTS['closing']}"},
    ]


def as_data(text: str) -> str:
    """Text without what could end a chat turn, and in valid Unicode."""
    text = text.encode("utf-8", "replace").decode("utf-8").replace("\x00", "")
    return _CONTROL.sub(lambda match: match[0] + _ZERO_WIDTH_SPACE, text)


def read_score(content: Any) -> float | None:
    """The score of a reply, rounded to 2 decimals; None unless it is exactly what was asked for.

    One JSON object with a number `score` in [0, 1] and a text `reason`, nothing before or after it
    (but a Markdown fence), no further keys.
    """
    if not isinstance(content, str):
        return None
    text = content.strip()
    if text.startswith("```"):
        text = text.removeprefix("```").removeprefix("json").removesuffix("```").strip()
    try:
        reply = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):
        return None
    if not isinstance(reply, dict) or set(reply) != {"reason", "score"}:
        return None
    score = reply["score"]
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        return None
    if not isinstance(reply["reason"], str) or not math.isfinite(score) or not 0 <= score <= 1:
        return None
    return round(float(score), 2)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)

"""Text from models and data sets, made safe to print: it is data, never terminal control.

raw text -> escape sequences and control characters out -> one line -> shortened in its middle
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

# CSI (ESC [ or its C1 form), OSC/DCS/APC/PM/SOS strings up to their terminator, two-byte escapes.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]?"
)
_SPACES = re.compile(r"\s+")
# Cc control, Cf format (bidirectional overrides, zero-width), Cs lone surrogates, Co private
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn"}


def printable(text: str) -> str:
    """One line of `text` without anything a terminal would obey or hide.

    Escape sequences vanish, white space of any kind becomes one space, and other invisible
    characters (controls, bidirectional overrides, lone surrogates) become U+FFFD.
    """
    text = _SPACES.sub(" ", _ESCAPES.sub("", text)).strip()
    return "".join("\ufffd" if unicodedata.category(c) in _INVISIBLE else c for c in text)


def shorten(text: str, characters: int) -> str:
    """`printable` text of at most `characters`, its middle left out: the answer is at the end."""
    # Far more than is shown is never looked at: a completion can be megabytes long.
    window = 8 * characters
    if len(text) > 2 * window:
        text = f"{text[:window]} {text[-window:]}"
    text = printable(text)
    if len(text) <= characters:
        return text
    head = (characters - 3) // 2
    tail = characters - 3 - head
    return f"{text[:head]} … {text[len(text) - tail :]}"


def columns(rows: Sequence[Sequence[str]], between: str = "  ") -> list[str]:
    """A line a row, its cells as wide as the widest of their column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [between.join(map(str.ljust, row, widths)).rstrip() for row in rows]


def clock(seconds: float) -> str:
    """`h:mm:ss`."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"

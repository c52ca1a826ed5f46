"""Brackets of a text: where a group ends, and what stands between separators outside of any."""

from __future__ import annotations


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

"""The rollouts of a step as one: under dynamic sampling a step draws several batches.

metrics of each draw ─ together ─> what they took in all, means over all of their completions
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COMPLETIONS = "igrpo/completions"
TOKENS = "igrpo/generated_tokens"
DROPPED = "igrpo/drafts_dropped"
"""Counted since the start of the run."""


def together(draws: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float]:
    """The metrics `names` of several rollouts; one that only some have is a mean over those."""
    return {name: _together(name, [draw for draw in draws if name in draw]) for name in names}


def _together(name: str, draws: Sequence[Mapping[str, Any]]) -> float:
    values = [float(draw[name]) for draw in draws]
    if name == DROPPED:
        return values[-1]
    if name in (COMPLETIONS, TOKENS) or name.startswith("timing/"):
        return sum(values)
    weights = [float(draw.get(COMPLETIONS, 1.0)) for draw in draws]
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)

"""Keys that earlier versions knew: what stands in their place.

A run folder of an earlier version names every key: a value that changed nothing is left out of
what is read, any other is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from igrpo_nemo.config.section import ABSENT, at


@dataclass(frozen=True, slots=True)
class Gone:
    """`unused` are the values under which the key changed nothing; `instead` is what to do."""

    unused: tuple[Any, ...]
    instead: str


GONE: dict[str, Gone] = {
    "igrpo.short_circuit": Gone(
        ("off", False), "it saved no time on either engine: leave it out, Stage 1 is sampled whole"
    ),
}
"""Dotted keys. YAML reads a bare `off` as false."""


def without_gone(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of plain values without the gone keys that changed nothing."""
    kept: dict[str, Any] = dict(values)
    for path, gone in GONE.items():
        if at(values, path, ABSENT) in gone.unused:
            kept = _without(kept, path.split("."))
    return kept


def gone_problem(path: str) -> str | None:
    """The line for a key that is gone, or that stands below one; None for any other."""
    for known in _and_above(path):
        if known in GONE:
            return f"{known} is gone: {GONE[known].instead}"
    return None


def _and_above(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def _without(values: Mapping[str, Any], path: list[str]) -> dict[str, Any]:
    if len(path) == 1:
        return {key: value for key, value in values.items() if key != path[0]}
    return {**values, path[0]: _without(values[path[0]], path[1:])}

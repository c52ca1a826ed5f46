"""What may stand in the mappings that the typed config leaves open to NeMo-RL 0.7.0.

    nemo_schema.json (names alone, made from NeMo-RL's annotations) -> unknown keys of a config

NeMo-RL lets unknown keys through without a word: a misspelt one would be a default in disguise.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")

OWN_SECTIONS = frozenset({"igrpo", "data", "env"})
"""Sections that are the project's, or rewritten for NeMo-RL: the typed config checks them."""


@dataclass(frozen=True, slots=True)
class NemoSchema:
    """Dotted key names.

    `annotated`: in NeMo-RL's own types. `used`: read by its code, or set in its example, without
    being annotated. `open`: mappings below which any key goes. `newer`: annotated in its main since
    then, of which `newer_open` are such mappings.
    """

    annotated: frozenset[str]
    used: frozenset[str]
    open: frozenset[str]
    newer: frozenset[str]
    newer_open: frozenset[str]

    @property
    def names(self) -> frozenset[str]:
        return self.annotated | self.used | self.open


@cache
def nemo_schema() -> NemoSchema:
    """The names of v0.7.0, and what its main has beyond them."""
    names = json.loads(FILE.read_text(encoding="utf-8"))
    return NemoSchema(**{kind: frozenset(values) for kind, values in names.items()})


def keys_beyond(
    values: Mapping[str, Any],
    known: frozenset[str],
    own_sections: Collection[str] = OWN_SECTIONS,
) -> list[str]:
    """Keys of a plain config that are not in `known`, outermost first; below open mappings and in
    `own_sections` none is looked at.
    """
    sections = {name: value for name, value in values.items() if name not in own_sections}
    return list(_beyond(sections, "", known))


def _beyond(value: Any, path: str, known: frozenset[str]) -> Iterator[str]:
    for item in value if isinstance(value, list) else [value]:
        for key, child in item.items() if isinstance(item, Mapping) else ():
            here = f"{path}.{key}" if path else str(key)
            if here not in known:
                yield here
            elif here not in nemo_schema().open | nemo_schema().newer_open:
                yield from _beyond(child, here, known)

"""What may stand in the mappings that the typed config leaves open to NeMo-RL 0.7.0.

    nemo_schema.json (names alone, made from NeMo-RL's annotations) -> unknown keys of a config
    nemo_types.yaml (what the checks and the preflight compute with) -> wrong types

NeMo-RL lets unknown keys through without a word: a misspelt one would be a default in disguise.
Over a wrong type its own code would trip late.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from igrpo_nemo.config.schema import Config
from igrpo_nemo.config.section import ABSENT, at, shown

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


def nearest_name(path: str) -> str | None:
    """The known key beside an unknown one that is spelled most like it; None where none is."""
    parent, _, leaf = path.rpartition(".")
    known = nemo_schema().names
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(leaf, siblings, n=1)
    return f"{parent}.{near[0]}" if near else None


def _beyond(value: Any, path: str, known: frozenset[str]) -> Iterator[str]:
    for item in value if isinstance(value, list) else [value]:
        for key, child in item.items() if isinstance(item, Mapping) else ():
            here = f"{path}.{key}" if path else str(key)
            if here not in known:
                yield here
            elif here not in nemo_schema().open | nemo_schema().newer_open:
                yield from _beyond(child, here, known)


KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "size": ("a whole number of 1 or more", lambda v: _is_integer(v) and v >= 1),
    "boolean": ("true or false", lambda v: isinstance(v, bool)),
    "share": ("a number above 0 and up to 1", lambda v: _is_number(v) and 0 < v <= 1),
    "count": ("null or a whole number", lambda v: v is None or _is_integer(v) and v >= 0),
    "granularity": ("full or selective", lambda v: v in ("full", "selective")),
}
"""The kinds of `nemo_types.yaml`: how to say one, and how to tell it."""


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def open_key_problems(config: Config) -> Iterator[str]:
    """A line for every wrong type inside the open mappings."""
    values = config.to_dict()
    for path, (kind, works) in _types().items():
        value, (says, accepts) = at(values, path, ABSENT), KINDS[kind]
        if value is not ABSENT and not accepts(value):
            yield f"{path}={shown(value)} should be {says}: set {path}={shown(works)}"


@cache
def _types() -> dict[str, tuple[str, Any]]:
    return yaml.safe_load(FILE.with_name("nemo_types.yaml").read_text(encoding="utf-8"))

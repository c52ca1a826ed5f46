"""The data sets known by name (catalog.yaml): where their rows are, and what their columns are.

A named set is looked for as a local file first (in the folder `IGRPO_DATA_DIR`), then on the hub.
A name that is not here is a path or a hub id.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from igrpo_nemo.errors import UserError


@dataclass(frozen=True, slots=True)
class Source:
    """A named set; catalog.yaml explains the fields."""

    name: str
    hub: str
    splits: dict[str, list[str]]
    subset: str | None = None
    question_key: str = "problem"
    answer_key: str = "answer"
    evaluation: bool = False
    usable: dict[str, int] = field(default_factory=dict)

    @property
    def default_split(self) -> str:
        return next(iter(self.splits))


SOURCES = {
    name: Source(name, **values)
    for name, values in yaml.safe_load(
        Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    ).items()
}
EVALUATION_SETS = tuple(name for name, source in SOURCES.items() if "test" in source.splits)
_ALIASES = {"minerva": "minerva_math"} | {
    alias: name
    for name, source in SOURCES.items()
    for alias in (name, source.hub.lower(), source.hub.lower().partition("/")[2])
}


def find_source(name: str) -> Source | None:
    """The named set, or None where `name` is a path or another hub id."""
    return SOURCES.get(_ALIASES.get(name.lower(), ""))


def source_of_file(path: str) -> Source | None:
    """The named set that a local file is, going by its name: its columns are then known."""
    name = Path(path).name
    for source in SOURCES.values():
        if any(name in files for files in source.splits.values()):
            return source
    return None


def local_folder() -> Path:
    """The folder in which files of named sets are looked for."""
    if named := os.environ.get("IGRPO_DATA_DIR"):
        return Path(named).expanduser()
    return Path(__file__).resolve().parents[3] / "shared" / "data"


def locate(source: Source, split: str | None) -> Path | None:
    """The local file of a split, or None where it is on the hub only. UserError: no such split."""
    split = split or source.default_split
    if split not in source.splits:
        raise UserError(
            f"the data set {source.name} has no split {split!r}: it has {', '.join(source.splits)}"
        )
    paths = (local_folder() / name for name in source.splits[split])
    return next((path for path in paths if path.is_file()), None)

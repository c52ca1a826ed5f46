"""The config tree as a list of dotted keys, for messages about unknown ones and `igrpo keys`."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from igrpo_nemo.config.igrpo_keys import LOCAL_ONLY
from igrpo_nemo.config.nemo_keys import NEMO_ONLY
from igrpo_nemo.config.schema import Config
from igrpo_nemo.config.section import Section


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the config with its one-line description; `section` where it holds further keys.

    `choices` are the words that it takes, none where any value of its type will do. `default` is
    the schema's, None where it has none.
    """

    path: str
    description: str
    section: type[Section] | None
    choices: tuple[str, ...] = ()
    default: Any = None


def all_keys(section: type[Section] = Config, prefix: str = "") -> Iterator[Key]:
    """Every key below a section, depth first, in the order of the schema."""
    for name, field in section.model_fields.items():
        child = section_of(field)
        default = None if field.is_required() else field.default
        yield Key(
            prefix + name,
            field.description or "",
            child,
            tuple(_choices(field.annotation)),
            None if child is not None or default is PydanticUndefined else default,
        )
        if child is not None:
            yield from all_keys(child, f"{prefix}{name}.")


def nearest_key(path: str, extra: Iterable[str] = ()) -> str | None:
    """The known key that an unknown dotted one most probably meant; None where none is like it.

    A sibling spelled alike comes first, then a key of the same last name in another section, then
    whatever is spelled alike. `extra` are further names at the root: the config groups.
    """
    known = [*(key.path for key in all_keys()), *extra]
    parent, _, leaf = path.rpartition(".")
    siblings = [k for k in known if k.rpartition(".")[0] == parent]
    if close := _close(leaf, [_leaf(k) for k in siblings], cutoff=0.6):
        return f"{parent}.{close}" if parent else close
    if namesakes := [k for k in known if _leaf(k) == leaf]:
        return _close(path, namesakes, cutoff=0.0)
    if close := _close(leaf, [_leaf(k) for k in known], cutoff=0.75):
        return next(k for k in known if _leaf(k) == close)
    return _close(path, known, cutoff=0.75)


def _close(word: str, candidates: list[str], cutoff: float) -> str | None:
    return next(iter(difflib.get_close_matches(word, candidates, n=1, cutoff=cutoff)), None)


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds, None where it holds a value."""
    annotation: Any = field.annotation
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _choices(annotation: Any) -> Iterator[str]:
    """The words of a `Literal`, also of one in a list or beside null."""
    if typing.get_origin(annotation) is typing.Literal:
        yield from typing.get_args(annotation)
        return
    for part in typing.get_args(annotation):
        yield from _choices(part)


def unread(config: Config) -> list[str]:
    """The keys whose value is not the default and that the config's engine does not read."""
    mark = NEMO_ONLY if config.igrpo.engine == "local" else LOCAL_ONLY
    return sorted(_unread(config, "", mark))


def _unread(section: Section, prefix: str, mark: object) -> Iterator[str]:
    for name in section.model_fields_set:
        value, field = getattr(section, name), type(section).model_fields[name]
        if isinstance(value, Section):
            yield from _unread(value, f"{prefix}{name}.", mark)
        elif mark in field.metadata and value not in (None, False, field.default):
            yield prefix + name

"""Where each value of a resolved config comes from, and the config as YAML with that beside it.

    files of the defaults list, in order -> overrides -> (path -> origin)
    a leaf that neither set: the schema's default; one that differs from what they set: derived

The files are read again, one by one, in the order in which Hydra merges them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from igrpo_nemo.config import derive
from igrpo_nemo.config.compose import (
    composed_values,
    config_folders,
    config_groups,
    hydra_arguments,
)
from igrpo_nemo.config.keys import section_of
from igrpo_nemo.config.schema import Config
from igrpo_nemo.config.section import Section

COMMAND_LINE = "command line"
COMMENT_COLUMN = 60
"""Comments begin here, or behind a longer line."""

KeyPath = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """What set a value: `where` is a file, the command line, or the code that derives it.

    `expression` is the `${...}` that stands there, where the value was not written out.
    """

    where: str
    expression: str | None = None

    def __str__(self) -> str:
        if self.expression is None:
            return self.where
        return f"{self.where}: {' '.join(self.expression.split())}"


DERIVED = Origin(f"derived: {Path(derive.__file__).parent.parent.name}/config/derive.py")


def origins_of(
    config: Config, overrides: Sequence[str], config_dir: Path | None = None
) -> dict[KeyPath, Origin]:
    """The origin of every leaf of `config`, which these overrides composed (and code derived).

    Raises `UserError` where the overrides do not compose.
    """
    folders = config_folders(config_dir)
    groups = config_groups(folders)
    composed = composed_values(overrides, folders, groups)
    trace = _trace(overrides, folders, groups)
    return {
        path: _origin(path, value, composed, trace) for path, value in _leaves(config.to_dict())
    }


def annotated_yaml(config: Config, origins: Mapping[KeyPath, Origin]) -> str:
    """The config as YAML, one leaf a line, each with its origin as a comment."""
    return "".join(_lines(config.to_dict(), (), origins))


def _trace(
    overrides: Sequence[str], folders: Sequence[Path], groups: dict[str, list[str]]
) -> dict[KeyPath, Origin]:
    """What set each key last: the files in Hydra's order of merging, then the overrides."""
    with initialize_config_dir(str(folders[0]), version_base="1.3"):
        listed = (
            GlobalHydra.instance()
            .config_loader()
            .compute_defaults_list(
                "config", hydra_arguments(overrides, folders, groups), RunMode.RUN
            )
        )
    trace: dict[KeyPath, Origin] = {}
    for default in listed.defaults:
        name = default.config_path or ""
        if name == "hydra/config" or name.startswith("hydra/"):
            continue
        file, shown = _file(name, folders)
        values = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        assert isinstance(values, dict)
        values.pop("defaults", None)
        package = tuple(filter(None, (default.package or "").split(".")))
        _lay(trace, package, values, shown)
    for override in listed.config_overrides:
        path = tuple(override.key_or_group.split("."))
        if override.is_delete():
            _forget(trace, path)
        else:
            _lay(trace, path, override.value(), COMMAND_LINE)
    return trace


def _file(name: str, folders: Sequence[Path]) -> tuple[Path, str]:
    """The file of a config name, and how it is called: `configs/...`, or the path as it is."""
    for number, folder in enumerate(folders):
        file = folder / f"{name}.yaml"
        if file.is_file():
            return file, f"configs/{name}.yaml" if number == 0 else str(file)
    raise FileNotFoundError(name)  # Hydra has just read it


def _lay(trace: dict[KeyPath, Origin], path: KeyPath, value: Any, where: str) -> None:
    """Merges a value into the trace as Hydra merges configs: mappings by key, others whole."""
    if isinstance(value, Mapping):
        if value:
            trace.pop(path, None)
        elif not any(known[: len(path)] == path for known in trace):
            trace[path] = Origin(where)
        for key, child in value.items():
            _lay(trace, (*path, str(key)), child, where)
        return
    _forget(trace, path)
    is_expression = isinstance(value, str) and "${" in value
    trace[path] = Origin(where, value if is_expression else None)


def _forget(trace: dict[KeyPath, Origin], path: KeyPath) -> None:
    for known in [known for known in trace if known[: len(path)] == path]:
        del trace[known]


_ABSENT = object()


def _origin(
    path: KeyPath, value: Any, composed: Mapping[str, Any], trace: Mapping[KeyPath, Origin]
) -> Origin:
    before = _at(composed, path)
    if before is _ABSENT:
        return _schema_origin(path)
    if before != value:
        return DERIVED
    # The value of `section: ${other}` has no entry of its own: its section's holds for it.
    return next(trace[path[:end]] for end in range(len(path), 0, -1) if path[:end] in trace)


def _schema_origin(path: KeyPath) -> Origin:
    """The file of the schema that declares the key, whose default it is; or derived."""
    section: type[Section] | None = Config
    module = None
    for name in path:
        if section is None or name not in section.model_fields:
            break
        owner = next(c for c in section.__mro__ if name in inspect.get_annotations(c))
        module, section = owner.__module__, section_of(section.model_fields[name])
    else:
        if module is not None:
            return Origin(f"default: {module.replace('.', '/')}.py")
    return DERIVED


def _at(values: Any, path: KeyPath) -> Any:
    for name in path:
        if not isinstance(values, Mapping) or name not in values:
            return _ABSENT
        values = values[name]
    return values


def _leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Everything that is no mapping, and empty mappings."""
    if not isinstance(value, Mapping) or not value:
        yield path, value
        return
    for key, child in value.items():
        yield from _leaves(child, (*path, str(key)))


def _lines(
    values: Mapping[str, Any], path: KeyPath, origins: Mapping[KeyPath, Origin]
) -> Iterator[str]:
    indent = "  " * len(path)
    for key, value in values.items():
        here = (*path, str(key))
        start = f"{indent}{_flow(key)}:"
        if isinstance(value, Mapping) and value:
            yield f"{start}\n"
            yield from _lines(value, here, origins)
        else:
            yield f"{f'{start} {_flow(value)}':<{COMMENT_COLUMN}}  # {origins[here]}\n"


class _OneLine(yaml.SafeDumper):
    """Writes texts with line breaks in double quotes, so that a leaf is a line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_OneLine.add_representer(str, _text)


def _flow(value: Any) -> str:
    text = yaml.dump(
        value, Dumper=_OneLine, default_flow_style=True, width=float("inf"), allow_unicode=True,
        sort_keys=False,
    )  # fmt: skip
    return text.removesuffix("...\n").rstrip("\n")

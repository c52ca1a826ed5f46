"""A resolved config as YAML, a value a line, each with what set it last.

files of the defaults list, in Hydra's order of merging, then the overrides -> (path -> setter)
a value that neither set: the schema's default; one that differs from what they set: derived
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from igrpo_nemo.config.compose import composed_values, config_folders, hydra_arguments
from igrpo_nemo.config.schema import Config, all_keys

COMMAND_LINE = "command line"
DERIVED = "derived: igrpo_nemo/config/derive.py"
COMMENT_COLUMN = 60
"""Comments begin here, or behind a longer line."""

KeyPath = tuple[str, ...]


def origins_of(
    config: Config, overrides: Sequence[str], config_dir: Path | None = None
) -> dict[KeyPath, str]:
    """What set each value of `config`, which these overrides composed (and code derived): a file,
    with the `${...}` that stands there, or the command line, or code.

    Raises `UserError` where the overrides do not compose.
    """
    folders = config_folders(config_dir)
    composed = dict(_leaves(composed_values(overrides, folders)))
    setters: dict[KeyPath, tuple[int, str]] = {}
    for number, (where, path, values) in enumerate(_sources(overrides, folders)):
        for leaf, value in _leaves(values, path):
            text = f"{where}: {' '.join(str(value).split())}" if "${" in str(value) else where
            if value != {} or leaf not in setters:
                setters[leaf] = (number, text)
    known = {tuple(key.path.split(".")) for key in all_keys()}

    def origin(path: KeyPath, value: Any) -> str:
        if path not in composed and path in known:
            return f"default: igrpo_nemo/config/{'igrpo' if path[0] == 'igrpo' else 'nemo'}_keys.py"
        if path not in composed or composed[path] != value:
            return DERIVED
        # What `section: ${other}` set has no entry of its own, and later setters win.
        above = (path[:end] for end in range(1, len(path) + 1))
        return max(setters[each] for each in above if each in setters)[1]

    return {path: origin(path, value) for path, value in _leaves(config.to_dict())}


def annotated_yaml(config: Config, origins: Mapping[KeyPath, str]) -> str:
    """The config as YAML, one leaf a line, each with its origin as a comment."""
    return "".join(_lines(config.to_dict(), (), origins))


def _sources(
    overrides: Sequence[str], folders: Sequence[Path]
) -> Iterator[tuple[str, KeyPath, Any]]:
    """What Hydra merges, in its order: how it is called, where it is laid, and its values."""
    with initialize_config_dir(str(folders[0]), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        arguments = hydra_arguments(overrides, folders)
        listed = loader.compute_defaults_list("config", arguments, RunMode.RUN)
    for default in listed.defaults:
        name = default.config_path or ""
        if name.startswith("hydra/"):
            continue
        folder = next(folder for folder in folders if (folder / f"{name}.yaml").is_file())
        file = folder / f"{name}.yaml"
        values = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        assert isinstance(values, dict)
        values.pop("defaults", None)
        package = tuple(filter(None, (default.package or "").split(".")))
        shown = f"configs/{name}.yaml" if folder == folders[0] else str(file)
        yield shown, package, values
    for override in listed.config_overrides:
        if not override.is_delete():
            yield COMMAND_LINE, tuple(override.key_or_group.split(".")), override.value()


def _leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Everything that is no mapping, and empty mappings."""
    if not isinstance(value, Mapping) or not value:
        yield path, value
        return
    for key, child in value.items():
        yield from _leaves(child, (*path, str(key)))


def _lines(
    values: Mapping[str, Any], path: KeyPath, origins: Mapping[KeyPath, str]
) -> Iterator[str]:
    for key, value in values.items():
        here = (*path, str(key))
        start = f"{'  ' * len(path)}{_flow(key)}:"
        if isinstance(value, Mapping) and value:
            yield f"{start}\n"
            yield from _lines(value, here, origins)
        else:
            yield f"{f'{start} {_flow(value)}':<{COMMENT_COLUMN}}  # {origins[here]}\n"


def _flow(value: Any) -> str:
    """A value on one line: texts with line breaks in double quotes."""
    style = '"' if "\\n" in repr(value) else None
    text = yaml.safe_dump(
        value, default_flow_style=True, default_style=style, width=float("inf"),
        allow_unicode=True, sort_keys=False,
    )  # fmt: skip
    return text.removesuffix("...\n").rstrip("\n")

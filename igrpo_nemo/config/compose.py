"""Hydra groups and overrides to a `Config`.

    configs/ + overrides --Hydra--> nested values --schema--> typed --derive--> derived --checks-->

Hydra's own complaints become one-line `UserError`s at this boundary.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from igrpo_nemo.config.checks import check
from igrpo_nemo.config.derive import derived
from igrpo_nemo.config.schema import Config, validated
from igrpo_nemo.config.section import at
from igrpo_nemo.errors import UserError

RESOLVERS: dict[str, Any] = {
    "mul": operator.mul,
    "div": operator.truediv,
    "max": max,
    "add": operator.add,
    "floor": math.floor,
    "pick": lambda condition, yes, no: yes if condition else no,
}
"""Functions that config files may call as `${mul:a,b}`; the first three are NeMo-RL's."""


OTHER_FOLDERS = ("cluster_configs", "skills", "study")
"""Folders of `configs/` that NeMo-Skills or `igrpo study` reads, and Hydra does not."""

SHOWN_OPTIONS = 10
"""A message names all options of a group up to this number, and the nearest of longer lists."""

_MISSING = "Missing mandatory value: "

_COLON_OF_A_PATH = re.compile(r"(?<=\w):(?=[A-Za-z_]\w*\s*:)")
"""In `{module:function: 1.0}`, where Hydra would take the module alone for the key."""

_MIXTURE = re.compile(r"\+*data\.train=\s*\[")


def builtin_config_dir() -> Path:
    """The folder of the project's config groups: inside an installed wheel, or in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "configs", package.parent / "configs"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise UserError(f"configs/ is missing beside {package}: install igrpo-nemo again")


def load_config(overrides: Sequence[str], config_dir: Path | None = None) -> Config:
    """The resolved, derived and checked config of a command line's Hydra overrides.

    `config_dir` is a further folder of config groups, searched after the built-in one. Raises
    `UserError` with one line for anything that does not compose, type-check or agree.
    """
    folders = config_folders(config_dir)
    groups = config_groups(folders)

    def default(path: str) -> Any:
        """What a key holds when of the overrides only the groups are taken."""
        chosen = [word for word in overrides if word.lstrip("+").partition("=")[0] in groups]
        try:
            return at(composed_values(chosen, folders), path)
        except UserError:
            return None

    return finished(composed_values(overrides, folders), groups, default)


def config_folders(config_dir: Path | None = None) -> list[Path]:
    """The built-in folder of config groups, and a further one. `UserError` where that is none."""
    if config_dir is None:
        return [builtin_config_dir()]
    if not config_dir.is_dir():
        raise UserError(f"there is no config folder {config_dir}")
    return [builtin_config_dir(), config_dir.resolve()]


def composed_values(overrides: Sequence[str], folders: Sequence[Path]) -> dict[str, Any]:
    """What Hydra makes of the groups in `folders` and the overrides, with every `${...}` resolved.

    The first folder holds `config.yaml`.
    """
    for name, resolver in RESOLVERS.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
    arguments = hydra_arguments(overrides, folders)
    try:
        with initialize_config_dir(str(folders[0]), version_base="1.3"):
            composed = compose("config", overrides=arguments)
            values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error, config_groups(folders))) from error
    except yaml.YAMLError as error:
        raise UserError(f"a config file is no YAML: {' '.join(str(error).split())}") from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def hydra_arguments(overrides: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """The overrides as Hydra takes them, and where it looks for groups beside the first folder."""
    groups = config_groups(folders)
    search = [f"hydra.searchpath=[{quoted(f'file://{folder}')}]" for folder in folders[1:]]
    arguments = [*search]
    for override in overrides:
        if _MIXTURE.match(override):  # Hydra puts no list in the place of a mapping.
            arguments.append("~data.train")
        arguments.append(_addable(override, groups))
    return arguments


def merged_files(overrides: Sequence[str], config_dir: Path | None = None) -> list[str]:
    """The config files that overrides name, in the order of merging: the later one wins."""
    folders = config_folders(config_dir)
    with initialize_config_dir(str(folders[0]), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        arguments = hydra_arguments(overrides, folders)
        listed = loader.compute_defaults_list("config", arguments, RunMode.RUN)
    names = [f"{default.config_path}.yaml" for default in listed.defaults]
    return [
        f"configs/{name}" if (folders[0] / name).is_file() else str(folders[-1] / name)
        for name in names
        if not name.startswith("hydra/")
    ]


def finished(
    values: dict[str, Any],
    groups: dict[str, list[str]],
    default: Callable[[str], Any] = lambda path: None,
) -> Config:
    """Plain values, typed, derived and checked. `default` knows a value that works for a key."""
    config = derived(validated(values, groups, default))
    check(config)
    return config


def read_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a run folder's `config.yaml`, as `Config.to_yaml` wrote it.

    `overrides` change keys alone: a written config holds no groups any more.
    """
    values = written_values(path)
    try:
        parser = OverridesParser.create()
        parsed = parser.parse_overrides([_addable(text, {}) for text in overrides])
    except HydraException as error:
        raise UserError(_one_line(error, {})) from error
    for override in parsed:
        key = override.key_or_group
        if override.is_delete() or (key in built_in_groups() and key not in values):
            raise UserError(f"{path} is composed already: give key=value, no group like {key}")
        if override.is_sweep_override():
            raise UserError(f"{key}: a list is [a,b], a text 'a,b'")
        values = with_value(values, key.split("."), override.value())
    return finished(values, {})


def written_values(path: Path) -> dict[str, Any]:
    """What a written config holds, unchecked. Raises `UserError` for a file that is none."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no config")
    return values


def with_value(values: Any, path: list[str], value: Any) -> Any:
    """A copy of nested mappings with one value replaced or added."""
    if not path:
        return value
    inside = values if isinstance(values, dict) else {}
    return {**inside, path[0]: with_value(inside.get(path[0]), path[1:], value)}


def quoted(text: str) -> str:
    """A text as the value of an override, whatever characters it holds."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def built_in_groups() -> dict[str, list[str]]:
    """Those of the built-in folder, each of which has a place in `config.yaml`."""
    return config_groups([builtin_config_dir()])


def config_groups(folders: Sequence[Path]) -> dict[str, list[str]]:
    """The options of every config group."""
    groups: dict[str, list[str]] = {}
    for file in (f for folder in folders for f in folder.glob("*/*.yaml")):
        if file.parent.name in OTHER_FOLDERS:
            continue
        groups.setdefault(file.parent.name, []).append(file.stem)
    return {group: sorted(set(options)) for group, options in sorted(groups.items())}


def _addable(override: str, groups: dict[str, list[str]]) -> str:
    """An override in a form that Hydra takes for any key, so that the schema judges it."""
    key, equals, value = override.partition("=")
    name = key.lstrip("+~").partition("@")[0]
    if not name or not (equals or key.startswith("~")):
        raise UserError(f"cannot read the override {override!r}: write key=value")
    if name.partition(".")[0] == "hydra":
        raise UserError(f"{name} is Hydra's own: igrpo takes config keys and groups alone")
    if name in groups:
        _check_option(name, value, groups)
        # Those have a place in the defaults list, where `+` is an error of Hydra's.
        return f"{name}={value}" if name in built_in_groups() and key == f"+{name}" else override
    if name == "igrpo.reward.custom":
        override = "=".join((key, _COLON_OF_A_PATH.sub(r"\:", value)))
    return f"++{override}" if key == name else override


def _check_option(group: str, value: str, groups: dict[str, list[str]]) -> None:
    option = " ".join(value.split()).strip("'\"")
    if option not in groups[group]:
        raise UserError(_no_option(group, option, groups[group]))


def _no_option(group: str, option: str, options: Sequence[str]) -> str:
    """The options that there are, or those of a long list that are spelled most like the one."""
    if len(options) > SHOWN_OPTIONS:
        near = difflib.get_close_matches(option, options, n=3, cutoff=0.0)
        shown = f"{', '.join(near)}, ... ({len(options)} in configs/{group})"
    else:
        shown = ", ".join(options) or "another one"
    return f"{group}={option} does not exist: use {shown}"


def _one_line(error: Exception, groups: dict[str, list[str]]) -> str:
    """Hydra's or OmegaConf's complaint, with the override or the key that it is about."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return _no_option(group, option, groups.get(group, error.options or []))
    message = str(error).partition("\n")[0] or type(error).__name__
    if _MISSING in message:
        key, at = message.rpartition(_MISSING)[2], getattr(error, "full_key", None)
        # Inside an interpolation `full_key` is the key that asked, not the one that is missing.
        key = at if at and at.endswith(key) else key
        return f"{key} is not set: give {key}=..."
    if isinstance(error, OverrideParseException):
        override = error.override.removeprefix("++")
        return f"cannot read the override {override!r}: {message} (quote special characters)"
    if message.startswith("Ambiguous value"):
        override = message.partition("'")[2].rstrip("'").removeprefix("++")
        return f"cannot read the override {override!r}: a list is [a,b], a text 'a,b'"
    key = getattr(error, "full_key", None)
    return f"{key}: {message}" if key and key not in message else message

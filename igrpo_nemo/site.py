"""The cluster profile of a run: `igrpo.site`, with what this account and this shell add.

    configs/cluster/*.yaml  <  cluster.local.yaml  <  environment variables  <  the command line

`cluster.local.yaml` is a file of the user's, beside the checkout's README and outside of version
control, with keys of `igrpo.site` at its root. Training itself never reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from igrpo_nemo.config import Config
from igrpo_nemo.config.site_keys import Site
from igrpo_nemo.errors import UserError

LOCAL_PROFILE = "cluster.local.yaml"

VARIABLES: dict[str, str] = {
    "account": "SBATCH_ACCOUNT",
    "partition": "SBATCH_PARTITION",
    "qos": "SBATCH_QOS",
    "constraint": "SBATCH_CONSTRAINT",
    "reservation": "SBATCH_RESERVATION",
    "time": "SBATCH_TIMELIMIT",
    "container": "CONTAINER_IMAGE",
    "mounts": "CONTAINER_MOUNTS",
    "venv": "VENV",
    "hf_home": "HF_HOME",
    "cpus_per_node": "CPUS_PER_NODE",
}
"""The environment variable of a key; `CONTAINER_MOUNTS` is a list with commas."""


def site_profile(
    config: Config, folder: Path, environ: Mapping[str, str], overrides: Sequence[str] = ()
) -> Site:
    """The profile of a composed config in `folder`, the checkout.

    `overrides` are the command line's, whose `igrpo.site.*` win. Raises `UserError` with one line
    that names the file or the variable whose value cannot be used.
    """
    local = _local_values(folder / LOCAL_PROFILE)
    shell = {key: environ[name] for key, name in VARIABLES.items() if environ.get(name)}
    values = {**local, **{key: _parsed(key, text) for key, text in shell.items()}}
    for key in _overridden(overrides):
        values.pop(key, None)
    # Only what was set: the profile is strict, and its defaults stay recognisable as such.
    merged = {**config.igrpo.site.model_dump(exclude_unset=True), **values}
    try:
        return Site.model_validate(merged)
    except ValidationError as error:
        problem = error.errors()[0]
        key = str(problem["loc"][0])
        source = f"{VARIABLES[key]} in the environment" if key in shell else LOCAL_PROFILE
        where = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"{source}: {where}={problem['input']!r}: {_reason(problem)}") from error


def _local_values(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no keys: write key: value, as `igrpo keys` lists igrpo.site")
    return values


def _parsed(key: str, text: str) -> Any:
    if key == "mounts":
        return [mount for mount in text.split(",") if mount]
    return int(text) if key == "cpus_per_node" and text.isdecimal() else text


def _overridden(overrides: Sequence[str]) -> list[str]:
    prefix = "igrpo.site."
    keys = (override.lstrip("+~").partition("=")[0] for override in overrides)
    return [key.removeprefix(prefix).partition(".")[0] for key in keys if key.startswith(prefix)]


def _reason(problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        return f"unknown key, the known ones are {', '.join(Site.model_fields)}"
    return str(problem["msg"]).removeprefix("Value error, ")

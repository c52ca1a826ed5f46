"""The cluster profile of a run, `igrpo.site`, and what a job script is told of it.

    configs/cluster/*.yaml  <  cluster.local.yaml  <  environment variables  <  the command line
      -> with_site -> Config
           -> job_settings -> assignments: NAME='value' lines that slurm/lib/settings.sh reads
           -> exports      -> export lines on the login node, for plain sbatch

`cluster.local.yaml` is a file of the user's, beside the checkout's README and outside of version
control, with keys of `igrpo.site` at its root. Training itself never reads it. Nothing in a setting
is secret.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from igrpo_nemo.config import Config
from igrpo_nemo.config.igrpo_keys import Site
from igrpo_nemo.errors import UserError
from igrpo_nemo.files.scrub import scrub

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
    "interface": "IGRPO_INTERFACE",
    "offline": "HF_HUB_OFFLINE",
    "cpus_per_node": "CPUS_PER_NODE",
}
"""The environment variable of a key; `CONTAINER_MOUNTS` is a list with commas."""

_SITE = "igrpo.site."
_FORMS = {"time": "write HH:MM:SS or D-HH:MM:SS", "mounts": "write SOURCE:DESTINATION[:ro]"}
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


def with_site(
    config: Config, folder: Path, environ: Mapping[str, str], overrides: Sequence[str] = ()
) -> Config:
    """A composed config with its profile in `igrpo.site`; `folder` is the checkout.

    `overrides` are the command line's, whose `igrpo.site.*` win; `env` is merged name by name.
    Raises `UserError` with one line that names the file or the variable whose value cannot be used.
    """
    local = _local_values(folder / LOCAL_PROFILE)
    shell = {key: environ[name] for key, name in VARIABLES.items() if environ.get(name)}
    values = {**local, **{key: _parsed(key, text) for key, text in shell.items()}}
    # Only what was set: the profile is strict, and its defaults stay recognisable as such.
    configured = config.igrpo.site.model_dump(exclude_unset=True)
    chosen = set(_overridden(overrides))
    values = {key: value for key, value in values.items() if key not in chosen}
    if "env" in values:
        values["env"] = _merged_env(configured.get("env") or {}, values["env"], chosen)
    try:
        site = Site.model_validate({**configured, **values})
    except ValidationError as error:
        problem = error.errors()[0]
        key = str(problem["loc"][0])
        from_shell = key in shell and key not in chosen
        source = f"{VARIABLES[key]} in the environment" if from_shell else LOCAL_PROFILE
        raise UserError(f"{source}: {_reason(problem)}") from None
    return config.replaced("igrpo", site=site)


def slurm_time(text: str) -> str:
    """A time limit in any of Slurm's forms as HH:MM:SS or D-HH:MM:SS; other text as it is.

    Slurm reads M, M:S, H:M:S, D-H, D-H:M and D-H:M:S (sbatch, `--time`).
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        return text
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] or match[4]:
        seconds = 3600 * first + 60 * second + third
    else:
        seconds = 60 * first + second
    days, seconds = days + seconds // 86400, seconds % 86400
    clock = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return f"{days}-{clock}" if days else clock


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its numbers of base 60, which would turn `time: 12:00:00` into 43200."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^(0|[1-9]\d*)$"), list("0123456789")
)


def _local_values(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no keys: write key: value, as `igrpo keys` lists igrpo.site")
    values = {str(key): value for key, value in values.items()}
    if isinstance(values.get("time"), str | int):
        values["time"] = slurm_time(str(values["time"]))
    if isinstance(values.get("env"), dict):
        values["env"] = {str(name): _variable(value) for name, value in values["env"].items()}
    return values


def _variable(value: Any) -> Any:
    """What a person means by `NCCL_IB_DISABLE: 1` or `true`: the text of the variable."""
    if isinstance(value, bool):
        return "1" if value else "0"
    return str(value) if isinstance(value, int) else value


def _parsed(key: str, text: str) -> Any:
    if key == "mounts":
        return [mount for mount in text.split(",") if mount]
    if key == "time":
        return slurm_time(text)
    if key == "offline" and text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    return int(text) if key == "cpus_per_node" and text.isdecimal() else text


def _merged_env(configured: Mapping[str, str], local: Any, chosen: set[str]) -> Any:
    if not isinstance(local, dict):
        return local
    overridden = {name for name in configured if f"env.{name}" in chosen}
    return {**configured, **{name: v for name, v in local.items() if name not in overridden}}


def _overridden(overrides: Sequence[str]) -> Iterator[str]:
    """Keys of the profile that the command line sets: `account`, `env` or `env.NAME`."""
    for override in overrides:
        name, _, value = override.partition("=")
        name = name.lstrip("+~")
        if name == _SITE.rstrip(".") and value.lstrip().startswith("{"):
            yield from (match[1] for match in re.finditer(r"[{,]\s*(\w+)\s*:", value))
        elif name.startswith(_SITE):
            yield name.removeprefix(_SITE)


def _reason(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {where}: the known ones are {', '.join(Site.model_fields)}"
    message = _FORMS.get(where.partition(".")[0]) or str(problem["msg"])
    message = message.removeprefix("Value error, ")
    # What stands in `env` is not shown: it may be the secret that is refused.
    shown = "" if where.startswith("env") else f"={problem['input']!r}"
    return f"{where}{shown}: {message}"


COMPUTE_CAPABILITY = {
    "cpu": "",
    "rtx_4090_24gb": "8.9",
    "l40s_48gb": "8.9",
    "a100_40gb": "8.0",
    "a100_80gb": "8.0",
    "h100_80gb": "9.0",
}
"""What CUDA kernels are compiled for, by `igrpo.site.gpu`. The images of NeMo-RL name others."""

CONVERSIONS = "NRL_MEGATRON_CHECKPOINT_DIR"


def job_settings(config: Config, checkout: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Every setting by its variable, empty where nothing is set; `env` of the profile wins.

    Raises `UserError` for a value of `env` that holds a credential.
    """
    site, offline = config.igrpo.site, "1" if config.igrpo.site.offline else "0"
    return {
        "IGRPO_RUN_DIR": str(absolute(config.logger.log_dir, checkout)),
        "IGRPO_CHECKPOINT_DIR": str(absolute(config.checkpointing.checkpoint_dir, checkout)),
        "IGRPO_ENGINE": config.igrpo.engine,
        "IGRPO_NUM_NODES": str(config.cluster.num_nodes),
        "IGRPO_GPUS_PER_NODE": str(config.cluster.gpus_per_node),
        "IGRPO_SAVE_MARGIN_S": str(site.save_margin_s),
        "IGRPO_MAX_RESTARTS": str(site.max_restarts),
        "CONTAINER_IMAGE": site.container or "",
        "CONTAINER_MOUNTS": ",".join(site.mounts),
        "VENV": str(absolute(site.venv, checkout)) if site.venv else "",
        "HF_HOME": site.hf_home or "",
        CONVERSIONS: environ.get(CONVERSIONS) or _conversions(config, checkout),
        "HF_HUB_OFFLINE": offline,
        "TRANSFORMERS_OFFLINE": offline,
        "WANDB_MODE": environ.get("WANDB_MODE") or ("offline" if site.offline else "online"),
        "TORCH_CUDA_ARCH_LIST": COMPUTE_CAPABILITY[site.gpu],
        "CPUS_PER_NODE": str(site.cpus_per_node or ""),
        "IGRPO_INTERFACE": site.interface or "",
        **_variables(site),
    }


def _conversions(config: Config, checkout: Path) -> str:
    """Where NeMo-RL keeps what it makes of a Hugging Face model: HF_HOME by itself. A container
    without one would have it on the node that made it, and nowhere else."""
    site = config.igrpo.site
    if config.igrpo.engine != "nemo_rl" or not site.container or site.hf_home:
        return ""
    return str(absolute(config.logger.log_dir, checkout) / "megatron")


def _variables(site: Site) -> dict[str, str]:
    for name, value in site.env.items():
        if scrub(value) != value:
            raise UserError(
                f"igrpo.site.env: the value of {name} holds a credential: export it in the shell, "
                "it is handed on"
            )
    return site.env


def assignments(settings: Mapping[str, str]) -> str:
    """NAME='value' lines, quoted for a shell. Raises `UserError` for what a line cannot hold."""
    return "".join(f"{name}={_quoted(name, value)}\n" for name, value in settings.items())


def exports(site: Site) -> str:
    """The profile for plain `sbatch slurm/X.sh`: a line for each value that is set."""
    values = {VARIABLES[key]: getattr(site, key) for key in VARIABLES}
    values["SBATCH_SIGNAL"] = f"B:USR1@{site.save_margin_s}"
    named = {name: _text(value) for name, value in values.items() if value not in (None, [])}
    named |= _variables(site)
    return "".join(f"export {name}={_quoted(name, value)}\n" for name, value in named.items())


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(value)
    return str(int(value)) if isinstance(value, bool) else str(value)


def _quoted(name: str, value: str) -> str:
    if not value.isprintable():
        raise UserError(f"{name} holds a line break or a control character: {value!r}")
    return shlex.quote(value)


def absolute(path: str, checkout: Path) -> Path:
    """A path of the config as the job sees it. Links stay: compute nodes may resolve others."""
    return Path(os.path.abspath(checkout / path))


_REACH_SLURM = ("SLURM_CONF", "SLURM_JWT")
"""Variables that say where Slurm is and who asks, not what is asked for."""


def sbatch_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of sbatch, and so of the job: the shell's, without the variables that the
    profile has taken up already, and without those of an allocation that the shell is in: the
    job's srun would obey them. A key set to null on the command line stays unset."""
    taken = {name for name in VARIABLES.values() if name.startswith("SBATCH_")} | {"SBATCH_SIGNAL"}
    return {
        name: value
        for name, value in environ.items()
        if name not in taken and (name in _REACH_SLURM or not name.startswith("SLURM_"))
    }

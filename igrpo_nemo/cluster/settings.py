"""What a job script needs to know, as lines that a shell evaluates; nothing in them is secret.

job_settings -> assignments: NAME='value'      in the job (slurm/lib/settings.sh)
exports      -> export NAME='value'            on the login node, for plain sbatch
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from igrpo_nemo.cluster.job import absolute
from igrpo_nemo.cluster.site import VARIABLES
from igrpo_nemo.config import Config
from igrpo_nemo.config.igrpo_keys import Site
from igrpo_nemo.errors import UserError
from igrpo_nemo.files.scrub import scrub

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

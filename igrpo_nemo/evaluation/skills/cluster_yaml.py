"""Our cluster profile (`igrpo.site`) as a cluster profile of NeMo-Skills.

    Site + workspace + images --cluster_values--> values --cluster_text--> cluster_configs/NAME.yaml

A machine without a scheduler gets the executor `none`: plain processes, no containers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml

from igrpo_nemo.config.igrpo_keys import Site
from igrpo_nemo.errors import UserError

WORKSPACE = "/workspace"
DEFAULT_TIME = "04:00:00"
ACCOUNT, PARTITION = "ACCOUNT", "PARTITION"
"""Stand in a profile whose site does not say them, for the user to replace."""

IMAGES = {"nemo-skills": "nemo-skills-0.7.sqsh", "vllm": "vllm.sqsh", "nemo-rl": "nemo-rl.sqsh"}
"""Container images by NeMo-Skills' names, as files in a folder of images."""

_HEAD = """\
# A cluster profile of NeMo-Skills, for --cluster={name} --config_dir=configs/cluster_configs.
# Made from the project's own: python pipelines/cluster_config.py {words}
"""


def cluster_values(
    site: Site, *, workspace: str = WORKSPACE, images: str | None = None
) -> dict[str, Any]:
    """The profile's keys. `workspace` is a folder of the shared disk for jobs and results; the
    containers see it under the same name. `images` holds the container images.

    Raises `UserError` for a value that NeMo-Skills cannot read.
    """
    if site.gpu == "cpu":
        return {"executor": "none", "containers": {name: "none" for name in IMAGES}}
    folder = images or f"{workspace}/images"
    hf_home = site.hf_home or f"{workspace}/hf"
    return {
        "executor": "slurm",
        "containers": {
            **{name: f"{folder}/{file}" for name, file in IMAGES.items()},
            **({"nemo-rl": site.container} if site.container else {}),
        },
        "account": site.account or ACCOUNT,
        "partition": site.partition or PARTITION,
        "job_dir": f"{workspace}/nemo_run",
        "job_name_prefix": "igrpo-",
        "mounts": _mounts(site.mounts, [workspace, hf_home]),
        "env_vars": _variables(site, hf_home),
        "default_timeout": site.time or DEFAULT_TIME,
        # A stage starts where the one before it succeeded; NeMo-Skills' default is afterany.
        "dependency_type": "afterok",
    }


def cluster_text(name: str, words: Sequence[str], values: dict[str, Any]) -> str:
    """The file: `words` are the command line that made it."""
    head = _HEAD.format(name=name, words=" ".join(words))
    if values.get("account") == ACCOUNT or values.get("partition") == PARTITION:
        head += (
            f"# Replace {ACCOUNT} and {PARTITION}, and the folders by yours on the shared disk.\n"
        )
    return head + yaml.safe_dump(values, sort_keys=False, width=100)


def sbatch_options(site: Site) -> dict[str, str]:
    """What a NeMo-Skills profile has no key for; `ns` takes it as `--sbatch_kwargs`."""
    values = {"qos": site.qos, "constraint": site.constraint, "reservation": site.reservation}
    return {name: value for name, value in values.items() if value}


def _mounts(mounts: Sequence[str], needed: Sequence[str]) -> list[str]:
    """SOURCE:DESTINATION alone (NeMo-Skills reads no `:ro`), with the needed folders among them."""
    kept = [":".join(mount.split(":")[:2]) for mount in mounts]
    for folder in needed:
        targets = [PurePosixPath(mount.split(":")[1]) for mount in kept]
        path = PurePosixPath(folder)
        if not any(path.is_relative_to(target) for target in targets):
            kept.append(f"{folder}:{folder}")
    return kept


def _variables(site: Site, hf_home: str) -> list[str]:
    values = {"HF_HOME": hf_home}
    if site.offline:
        values |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    for name, value in {**values, **site.env}.items():
        if "=" in value:
            raise UserError(f"igrpo.site.env.{name}={value}: NeMo-Skills reads no value with a =")
    return [f"{name}={value}" for name, value in {**values, **site.env}.items()]

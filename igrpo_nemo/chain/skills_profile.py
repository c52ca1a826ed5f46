"""The NeMo-Skills cluster profile of a chain: the user's, with this run's folder and account.

configs/cluster_configs/NAME.yaml + igrpo.site + run folder --> RUN/stages/NAME.yaml
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from igrpo_nemo.config.site_keys import Site
from igrpo_nemo.evaluation.skills.submit import ClusterProfile, cluster_profile
from igrpo_nemo.files.atomic import write_or_refuse


def chain_profile(
    name: str, config_dir: Path, site: Site, needed: Sequence[Path], folder: Path, **values: Any
) -> ClusterProfile:
    """Writes `folder/NAME.yaml` and reads it: what the site says wins, and every `needed` folder
    (absolute) that no mount has is mounted at its own name, as the training's containers do.
    `values` replace keys of the profile."""
    cluster_profile(name, config_dir)  # its complaints name the user's file
    values = {**read_values(name, config_dir), **_of_site(site), **values}
    mounts = [str(mount) for mount in values.get("mounts") or []]
    for path in needed:
        sources = [Path(mount.split(":")[0]) for mount in mounts]
        if not any(path == source or source in path.parents for source in sources):
            mounts.append(f"{path}:{path}")
    values["mounts"] = mounts
    write_or_refuse(folder / f"{name}.yaml", yaml.safe_dump(values, sort_keys=False))
    return cluster_profile(name, folder)


def read_values(name: str, config_dir: Path) -> dict[str, Any]:
    """The keys of `config_dir/NAME.yaml`."""
    return yaml.safe_load((config_dir / f"{name}.yaml").read_text(encoding="utf-8"))


def default_profile(gpu: str) -> str:
    """The profile's name for a kind of GPU."""
    return f"slurm_{gpu.partition('_')[0]}"


def _of_site(site: Site) -> dict[str, Any]:
    values = {"account": site.account, "partition": site.partition, "default_timeout": site.time}
    # A chain's stages start where the one before succeeded.
    known: dict[str, Any] = {name: value for name, value in values.items() if value}
    return {**known, "dependency_type": "afterok"}

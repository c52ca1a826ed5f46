"""The environments of NeMo-RL's workers on bare metal (nemo/processes.py says where they are).

NeMo-RL makes a missing one on the compute nodes as the run starts (nemo_rl/utils/venvs.py), which
needs a network that they rarely have. Looked at on the login node, before anything is submitted.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from igrpo_nemo.cluster.site import absolute
from igrpo_nemo.config import Config
from igrpo_nemo.errors import UserError
from igrpo_nemo.nemo.processes import (
    ONE_PYTHON,
    WORKERS_FOLDER,
    environments_of,
    policy_worker,
    source_tree,
)

_FIND = "import importlib.util as u; s = u.find_spec('nemo_rl'); print(s.origin if s else '')"


def check_worker_environments(config: Config, checkout: Path, environ: Mapping[str, str]) -> None:
    """Raises `UserError` naming the environments of workers that are missing, and how to make them.

    Nothing is said in a container, with a network, with one environment for all,
    or where this machine has no NeMo-RL to look at.
    """
    site = config.igrpo.site
    environ = {**environ, **site.env}
    if config.igrpo.engine != "nemo_rl" or site.container or not site.offline:
        return
    python = (absolute(site.venv, checkout) if site.venv else checkout / ".venv") / "bin" / "python"
    if environ.get(ONE_PYTHON) == "1" or (folder := _folder(python, environ)) is None:
        return
    missing = [name for name in workers(config) if not (folder / name / "bin/python").exists()]
    if missing:
        kinds = " ".join(name.rpartition(".")[2] for name in missing)
        raise UserError(
            f"{folder} has no environment for NeMo-RL's {kinds}, and compute nodes have no network "
            f"to make one (igrpo.site.offline): run {WORKERS_FOLDER}={folder} {python} -m "
            f"nemo_rl.utils.prefetch_venvs {kinds} here, or set igrpo.site.env.{ONE_PYTHON}=1 "
            "where one environment has everything"
        )


def workers(config: Config) -> Iterator[str]:
    """The classes of a run that NeMo-RL's ray_actor_environment_registry gives environments."""
    policy, models = config.policy, "nemo_rl.models"
    yield policy_worker(config)
    if policy.generation.backend == "vllm":
        if (policy.generation.vllm_cfg or {}).get("async_engine"):
            yield f"{models}.generation.vllm.vllm_worker_async.VllmAsyncGenerationWorker"
        else:
            yield f"{models}.generation.vllm.vllm_worker.VllmGenerationWorker"
    if (config.grpo.async_grpo or {}).get("enabled"):
        yield "nemo_rl.algorithms.async_utils.AsyncTrajectoryCollector"
        yield "nemo_rl.algorithms.async_utils.ReplayBuffer"
    if (config.data_plane or {}).get("enabled"):
        yield "nemo_rl.experience.sync_rollout_actor.SyncRolloutActor"


def _folder(python: Path, environ: Mapping[str, str]) -> Path | None:
    """Where NeMo-RL keeps the environments; None where `python` has no NeMo-RL."""
    if environ.get(WORKERS_FOLDER) or not python.exists():
        return environments_of(None, environ)
    command = [str(python), "-c", _FIND]
    try:
        done = subprocess.run(
            command, env=dict(environ), capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{python}, the run's Python (igrpo.site.venv), does not run") from error
    tree = source_tree(origin) if (origin := done.stdout.strip()) else None
    return environments_of(tree, environ)

"""Ray and the processes that it starts: which Ray, which Python, and this package on their path.

On bare metal each kind of NeMo-RL's workers runs in an environment of its own, made by `uv`:

    NEMO_RL_VENV_DIR, or venvs/ beside NeMo-RL's package   /CLASS/bin/python
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import igrpo_nemo
from igrpo_nemo.config import Config
from igrpo_nemo.errors import UserError

LOCAL_RAY_CPUS = 4
"""Places for actors, not cores: TransferQueue keeps three, and the others need one to start in."""

ONE_PYTHON = "NEMO_RL_PY_EXECUTABLES_SYSTEM"
"""NeMo-RL's variable: `1` says that the driver's Python has what every worker needs."""
WORKERS_FOLDER = "NEMO_RL_VENV_DIR"
"""Where NeMo-RL's workers have an environment each, at CLASS/bin/python."""
MEGATRON_WORKER = "nemo_rl.models.policy.workers.megatron_policy_worker.MegatronPolicyWorker"


def source_tree(origin: str | None = None) -> Path | None:
    """The tree of NeMo-RL, whose package begins at `origin`: by default the installed one."""
    if origin is None and (found := importlib.util.find_spec("nemo_rl")):
        origin = found.origin
    return Path(origin).parents[1] if origin else None


def environments_of(tree: Path | None, environ: Mapping[str, str]) -> Path | None:
    """Where the workers' environments are; None where there is no NeMo-RL either."""
    if named := environ.get(WORKERS_FOLDER):
        return Path(named)
    return tree / "venvs" if tree else None


def policy_worker(config: Config) -> str:
    """The class of the workers that train."""
    if (config.policy.megatron_cfg or {}).get("enabled"):
        return MEGATRON_WORKER
    module, name = "dtensor_policy_worker", "DTensorPolicyWorker"
    if config.policy.dtensor.get("_v2"):
        module, name = f"{module}_v2", f"{name}V2"
    return f"nemo_rl.models.policy.workers.{module}.{name}"


def prepare_environment(config: Config) -> None:
    """Variables that must be set before NeMo-RL is imported.

    Raises `UserError` where one is missing that only the user knows.
    """
    if config.igrpo.engine == "nemo_rl_local":
        os.environ[ONE_PYTHON] = "1"
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    elif config.policy.megatron_cfg and config.policy.megatron_cfg.get("enabled"):
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            raise UserError(
                "TORCH_CUDA_ARCH_LIST is not set, which Megatron needs: export "
                "TORCH_CUDA_ARCH_LIST=8.0 for A100, 9.0 for H100"
            )


def use_one_python() -> None:
    """Has every actor of NeMo-RL run in this Python where `ONE_PYTHON` says so.

    NeMo-RL itself does that for its vLLM, SGLang and Megatron workers alone: DTensor's workers and
    the actors that roll out would be started with `uv run`.
    """
    from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
    from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES

    if os.environ.get(ONE_PYTHON) == "1":
        for actor, executable in ACTOR_ENVIRONMENT_REGISTRY.items():
            if executable.startswith("uv "):
                ACTOR_ENVIRONMENT_REGISTRY[actor] = PY_EXECUTABLES.SYSTEM


def put_package_on_path(run_folder: Path) -> None:
    """Puts this package on the path of workers: they run in environments of their own, and unpickle
    our loss and map there.

    Of an installed package only a link in the run folder: the other packages beside it are the
    driver's, and would stand before the workers' own.
    """
    package = Path(igrpo_nemo.__file__).resolve().parent
    root = package.parent
    if root.name in ("site-packages", "dist-packages"):
        root = run_folder.resolve() / "package"
        root.mkdir(exist_ok=True)
        link = root / package.name
        if not link.is_symlink() or link.resolve() != package:
            link.unlink(missing_ok=True)
            link.symlink_to(package)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(root) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, paths)])


@contextmanager
def ray_running(config: Config) -> Iterator[None]:
    """NeMo-RL's own Ray start on a cluster; a small private one for the local engine.

    A Ray that runs already is used as it is, and left running. Inside, the environment names this
    process's Ray: NeMo-RL looks one up by that, and otherwise fails where a machine runs two.
    """
    import ray

    ours = not ray.is_initialized()
    if ours and config.igrpo.engine == "nemo_rl":
        from nemo_rl.distributed.virtual_cluster import init_ray

        init_ray()
    elif ours:
        ray.init(
            address="local",
            num_cpus=LOCAL_RAY_CPUS,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}},
        )
    try:
        with variable("RAY_ADDRESS", ray.get_runtime_context().gcs_address):
            yield
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """An environment variable, for the duration of a `with` block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def nodes_lost() -> bool:
    """Whether Ray has seen a node go."""
    import ray

    return any(not node["Alive"] for node in ray.nodes())

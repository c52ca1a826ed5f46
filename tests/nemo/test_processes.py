"""What Ray's processes find: one Python where that is asked for, and this package alone."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from nemo_rl.distributed import ray_actor_environment_registry as registry
from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES

from igrpo_nemo.nemo import processes

WORKERS = (
    "nemo_rl.models.policy.workers.dtensor_policy_worker.DTensorPolicyWorker",
    "nemo_rl.models.policy.workers.dtensor_policy_worker_v2.DTensorPolicyWorkerV2",
    "nemo_rl.algorithms.async_utils.AsyncTrajectoryCollector",
    "nemo_rl.algorithms.async_utils.ReplayBuffer",
    "nemo_rl.experience.sync_rollout_actor.SyncRolloutActor",
)


@pytest.mark.parametrize("one", ["1", "0"])
def test_one_python_serves_every_worker_where_it_is_asked_for(monkeypatch, one):
    """NeMo-RL's own variable covers the vLLM, SGLang and Megatron workers alone."""
    before = dict(registry.ACTOR_ENVIRONMENT_REGISTRY)
    before |= dict.fromkeys(WORKERS, PY_EXECUTABLES.FSDP)
    monkeypatch.setattr(registry, "ACTOR_ENVIRONMENT_REGISTRY", dict(before))
    monkeypatch.setenv(processes.ONE_PYTHON, one)
    processes.use_one_python()
    found = {registry.get_actor_python_env(worker) for worker in WORKERS}
    assert found == {PY_EXECUTABLES.SYSTEM if one == "1" else PY_EXECUTABLES.FSDP}


@pytest.mark.parametrize("folder", ["checkout", "site-packages"])
def test_workers_find_this_package_and_nothing_beside_it(monkeypatch, tmp_path, folder):
    package = tmp_path / folder / "igrpo_nemo"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (tmp_path / folder / "torch").mkdir()
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setattr(
        processes, "igrpo_nemo", SimpleNamespace(__file__=str(package / "__init__.py"))
    )
    monkeypatch.setenv("PYTHONPATH", "/other")
    for _ in range(2):
        processes.put_package_on_path(run)
    first, other = os.environ["PYTHONPATH"].split(os.pathsep)
    assert other == "/other"
    assert os.path.samefile(os.path.join(first, "igrpo_nemo"), package)
    assert os.path.exists(os.path.join(first, "torch")) is (folder == "checkout")

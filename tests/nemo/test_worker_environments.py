"""Bare metal: the environments of NeMo-RL's workers are there before a job is submitted."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_real_setup import CASES, composed

from igrpo_nemo.cluster.worker_environments import check_worker_environments, workers
from igrpo_nemo.config import load_config
from igrpo_nemo.config.igrpo_keys import Site
from igrpo_nemo.errors import UserError

EXPERIMENTS = [case for case in CASES if case.startswith("table")]
MEGATRON = "table1_openmath_nemotron_14b_igrpo"


def missing(config, folder: Path, **site):
    config = config.replaced("igrpo", site=Site(**site))
    check_worker_environments(config, folder, {"NEMO_RL_VENV_DIR": str(folder)})


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_classes_are_those_that_nemo_rl_makes_environments_for(experiment):
    from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY

    names = list(workers(composed(experiment)))
    assert len(names) >= 2 and set(names) <= set(ACTOR_ENVIRONMENT_REGISTRY)


def test_a_missing_environment_is_named_with_the_command_that_makes_it(tmp_path):
    config = load_config([f"experiment={MEGATRON}"])
    first, *others = workers(config)
    with pytest.raises(UserError, match="MegatronPolicyWorker Vllm.*-m nemo_rl.utils.prefetch_ven"):
        missing(config, tmp_path)
    for name in (first, *others):
        with pytest.raises(UserError, match=f"NeMo-RL's .*{name.rpartition('.')[2]}"):
            missing(config, tmp_path)
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "python").touch()
    missing(config, tmp_path)


@pytest.mark.parametrize(
    "site",
    [
        {"container": "img"},
        {"offline": False},
        {"env": {"NEMO_RL_PY_EXECUTABLES_SYSTEM": "1"}},
    ],
)
def test_nothing_is_asked_for_where_nothing_is_built(tmp_path, site):
    missing(load_config([f"experiment={MEGATRON}"]), tmp_path, **site)

"""One small Ray for all tests of this folder, and the small policy that they train."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nemo_source
import pytest

os.environ["NEMO_RL_PY_EXECUTABLES_SYSTEM"] = "1"
os.environ["IGRPO_TEST_NEMO"] = "1"  # read by tests/processes/sitecustomize.py
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Ray's own 15 lets workers starve beside other tests.
os.environ.setdefault("RAY_worker_niceness", "0")

# Without NeMo-RL no test of this folder is collected, and the run says why.
collect_ignore_glob = [] if nemo_source.FOUND else ["test_*.py"]


def pytest_report_collectionfinish() -> list[str]:
    return [] if nemo_source.FOUND else [f"tests/nemo is left out: {nemo_source.MISSING}"]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if not nemo_source.FOUND and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


@pytest.fixture(scope="session")
def ray_cluster():
    """Four places: TransferQueue keeps three, and every other actor starts in one.

    Ray's processes find this folder's modules and NeMo-RL.
    """
    import ray

    before = os.environ["PYTHONPATH"]
    paths = [before, str(Path(__file__).parent), *filter(None, sys.path)]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="session")
def policy_folder() -> str:
    """A small policy that answers in the format half of the time: rewards differ within groups.

    It is kept for later sessions, under a name that its settings make.
    """
    from nemo_runs import tiny_policy

    return tiny_policy(nemo_source.DEFAULT_SOURCE.parent / "test-policies")

"""One small Ray for all tests of this folder, and the small policy that they train."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nemo_source
import pytest

os.environ["NEMO_RL_PY_EXECUTABLES_SYSTEM"] = "1"
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

# Without NeMo-RL no test of this folder is collected, and the run says why.
collect_ignore_glob = [] if nemo_source.FOUND else ["test_*.py"]


def pytest_report_collectionfinish() -> list[str]:
    return [] if nemo_source.FOUND else [f"tests/nemo is left out: {nemo_source.MISSING}"]


SITE = """\
import sys
if sys.version_info < (3, 12):
    import typing
    import typing_extensions
    typing.TypedDict = typing_extensions.TypedDict
"""


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory):
    """Four places: TransferQueue keeps three, and every other actor starts in one.

    Ray's processes find this folder's modules and NeMo-RL, and get the same `TypedDict`.
    """
    import ray

    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(SITE)
    paths = [str(site), str(Path(__file__).parent), *filter(None, sys.path)]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="session")
def policy_folder() -> str:
    """A small policy that answers in the format half of the time: rewards differ within groups.

    It is kept for later sessions, under a name that its settings make.
    """
    from nemo_runs import tiny_policy

    return tiny_policy(nemo_source.DEFAULT_SOURCE.parent / "test-policies")

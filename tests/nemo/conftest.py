"""The real NeMo-RL 0.7.0, where its source is found, and one small Ray for all tests."""

from __future__ import annotations

import os
import sys
import typing
from pathlib import Path

import pytest
import typing_extensions

DEFAULT_SOURCE = Path.home() / ".cache" / "igrpo-nemo" / "nemo-rl-0.7.0"
MISSING = (
    "NeMo-RL 0.7.0 is neither importable nor found: set NEMO_RL_SRC to its source tree, or put it "
    f"in {DEFAULT_SOURCE}"
)

if sys.version_info < (3, 12):
    # pydantic, through which NeMo-RL reads its configs, refuses the standard one before 3.12.
    typing.TypedDict = typing_extensions.TypedDict  # type: ignore[misc]

os.environ["NEMO_RL_PY_EXECUTABLES_SYSTEM"] = "1"
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def _find_nemo_rl() -> bool:
    source = Path(os.environ.get("NEMO_RL_SRC", DEFAULT_SOURCE))
    if (source / "nemo_rl").is_dir():
        sys.path.insert(0, str(source))
        return True
    try:
        import nemo_rl  # noqa: F401
    except ImportError:
        return False
    return True


FOUND = _find_nemo_rl()
collect_ignore_glob = [] if FOUND else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not FOUND:
        for item in items:
            if "tests/nemo" in str(item.path):
                item.add_marker(pytest.mark.skip(reason=MISSING))


@pytest.fixture(scope="session")
def ray_cluster():
    """Two CPUs are enough: the environment actor and what a trainer may start beside it."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}},
    )
    yield
    ray.shutdown()

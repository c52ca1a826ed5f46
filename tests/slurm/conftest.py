"""One virtual Slurm for the tests of this folder, and what goes on there beside them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from side_stories import NEMO_SOURCE, STORIES
from slurm_jobs import Run
from virtual_slurm import Unavailable, VirtualSlurm

# Ray's own 15 lets workers starve beside other tests.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(scope="session")
def cluster() -> Iterator[VirtualSlurm]:
    # Not pytest's own temporary folder: the names of Ray's sockets have to be short.
    root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    try:
        try:
            slurm = VirtualSlurm(root).start()
        except Unavailable as reason:
            pytest.skip(f"NO SLURM HERE, nothing of slurm/ is tested: {reason}")
        try:
            yield slurm
        finally:
            slurm.stop()
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def run(cluster: VirtualSlurm, tmp_path: Path) -> Iterator[Run]:
    """A run of one test; its job does not outlive the test."""
    run = Run(cluster, tmp_path)
    yield run
    if run.job:
        cluster.run("scancel", run.job)


@pytest.fixture(scope="session", autouse=True)
def stories(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Run]]]:
    """Starts, before the first test, the side stories that any of the chosen tests looks at."""
    items = request.session.items
    names = [n for n in STORIES if any(n in getattr(i, "fixturenames", ()) for i in items)]
    try:
        cluster = request.getfixturevalue("cluster") if names else None
    except pytest.skip.Exception:
        cluster = None  # tests that need no Slurm run all the same
    if cluster is None:
        yield {}
        return
    folders = request.getfixturevalue("tmp_path_factory")
    pool = ThreadPoolExecutor(max_workers=1)
    yield {name: pool.submit(STORIES[name], cluster, folders.mktemp(name)) for name in names}
    # Not waited for: without its Slurm a story ends by itself.
    pool.shutdown(wait=False, cancel_futures=True)


@pytest.fixture(scope="session")
def launched(cluster: VirtualSlurm, stories: dict[str, Future[Run]]) -> Run:
    return stories["launched"].result(timeout=900)


@pytest.fixture(scope="session")
def full_disk(cluster: VirtualSlurm, stories: dict[str, Future[Run]]) -> Run:
    return stories["full_disk"].result(timeout=900)


@pytest.fixture(scope="session")
def stopped_nemo(cluster: VirtualSlurm, stories: dict[str, Future[Run]]) -> Run:
    if "stopped_nemo" not in stories:
        pytest.skip(
            f"NEMO-RL IS NOT HERE: set NEMO_RL_SRC to its source, or put it in {NEMO_SOURCE}"
        )
    return stories["stopped_nemo"].result(timeout=900)

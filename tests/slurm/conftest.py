"""One virtual Slurm for the tests of this folder, and a run that nothing happens to."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_jobs import Run
from virtual_slurm import Unavailable, VirtualSlurm


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


@pytest.fixture(scope="session")
def launched(cluster: VirtualSlurm, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`bash slurm/train.sh ... --chain 2` on the login node; undisturbed, on node2.

    `jobs` are the chain's; the run's own job is the first of them.
    """
    run = Run(cluster, tmp_path_factory.mktemp("launched"))
    done = run.login("bash", "slurm/train.sh", *run.words(node="node2"), "--chain", "2")
    assert done.returncode == 0, done.stderr
    submitted = re.search(r"submitted jobs (\d+) (\d+)", done.stdout)
    assert submitted, done.stdout
    run.job, run.successor = submitted[1], submitted[2]
    return run

"""What goes on by itself on a third node while other tests use the first two; each returns its run.

The tests of a story look at what it left.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from slurm_jobs import ENDED, Run
from virtual_slurm import VirtualSlurm

BESIDE = ("--partition=side",)

NEMO_SOURCE = Path(
    os.environ.get("NEMO_RL_SRC", Path.home() / ".cache" / "igrpo-nemo" / "nemo-rl-0.7.0")
)


def launched(cluster: VirtualSlurm, folder: Path) -> Run:
    """`bash slurm/train.sh ... --chain 2` on the login node; nothing happens to its jobs.

    The run's job is the first of the two.
    """
    run = Run(cluster, folder)
    words = run.words("igrpo.site.partition=side")
    done = run.login("bash", "slurm/train.sh", *words, "--chain", "2")
    assert done.returncode == 0, done.stderr
    submitted = re.search(r"submitted jobs (\d+) (\d+)", done.stdout)
    assert submitted, done.stdout
    run.job = submitted[2]
    run.wait_for_state(*ENDED)
    run.job, run.successor = submitted[1], submitted[2]
    return run


def full_disk(cluster: VirtualSlurm, folder: Path) -> Run:
    """The run folder's disk is full after step 7, and has room again when the job has ended."""
    run = Run(cluster, folder, log_dir=cluster.small / "run")
    run.close_gate(7)
    run.train(flags=BESIDE)
    run.wait_at_gate(7)
    filler = cluster.seen(cluster.small) / "filler"
    fill(filler)
    run.open_gate(7)
    run.wait_for_state(*ENDED)
    run.seen = cluster.out("scontrol", "show", "job", run.job)
    filler.unlink()
    cluster.out("scontrol", "requeue", run.job)
    run.wait_for_state(*ENDED)
    return run


def fill(file: Path) -> None:
    """Writes until nothing goes on the disk any more."""
    with file.open("wb", buffering=0) as sink:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while sink.write(b"x" * size):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC


def stopped_nemo(cluster: VirtualSlurm, folder: Path) -> Run:
    """NeMo-RL's own loop, until it is back in the queue because of its time limit."""
    run = Run(cluster, folder)
    run.close_gate(2)
    words = ("engine=nemo_rl_local", "grpo.max_num_steps=4")
    flags = (*BESIDE, "--time=8:00:00")
    paths = f"{os.environ['PYTHONPATH']}:{NEMO_SOURCE}"
    run.train(*words, flags=flags, PYTHONPATH=paths, IGRPO_TEST_NEMO="1")
    run.wait_at_gate(2)
    run.signal("USR1")
    run.wait_for_state("PENDING", *ENDED)
    run.seen = cluster.out("scontrol", "show", "job", run.job)
    cluster.out("scancel", run.job)
    return run


STORIES = {"launched": launched, "full_disk": full_disk}
if (NEMO_SOURCE / "nemo_rl").is_dir():
    STORIES["stopped_nemo"] = stopped_nemo

"""One node and the real `igrpo train`, without Ray: what can happen to a job, and what follows."""

from __future__ import annotations

import pytest
from slurm_jobs import STEPS, Run
from virtual_slurm import wait_for

pytestmark = pytest.mark.timeout(900)

ALL_STEPS = list(range(1, STEPS + 1))
ON_NODE1 = ("--nodelist=node1",)


def preempt(run: Run) -> None:
    flags = ("--exclusive", "--partition=urgent", "--nodelist=node1", "--output=/dev/null")
    done = run.cluster.run("sbatch", *flags, "--wrap=sleep 1")
    assert done.returncode == 0, done.stderr


def lose_node(run: Run) -> None:
    run.cluster.out("scontrol", "update", "nodename=node1", "state=down", "reason=test")
    wait_for(lambda: run.state() == "PENDING", 60, "requeued job")

    def is_back() -> bool:
        # Refused where the node has come back by itself already.
        run.cluster.run("scontrol", "update", "nodename=node1", "state=resume")
        return "idle" in run.cluster.out("sinfo", "-h", "-n", "node1", "-p", "batch", "-o", "%T")

    wait_for(is_back, 60, "return of node1")


def test_a_run_survives_what_happens_to_its_node_and_its_processes(cluster, launched, tmp_path):
    """A time limit, preemption, a lost node, a killed driver, a killed step: five restarts."""
    faults = {
        2: lambda run: run.signal("USR1"),
        4: preempt,
        6: lose_node,
        9: lambda run: run.kill("paced_igrpo.py train", node="node1"),
        12: Run.kill_head_step,
    }
    run = Run(cluster, tmp_path)
    for step in faults:
        run.close_gate(step)
    run.train(flags=ON_NODE1)
    saved = []
    for step, fault in faults.items():
        run.wait_at_gate(step)
        assert run.steps() == list(range(1, step + 1))
        saved.append(run.newest_checkpoint())
        fault(run)
    assert run.wait_for_state("COMPLETED", "FAILED")["ExitCode"] == "0:0", run.log()
    # Nothing is lost but what came after the last checkpoint; what a driver could save in the
    # seconds that it was given counts.
    resumed = [run.resumed_after(restart) for restart in (1, 2, 3, 4, 5)]
    assert resumed[0] == 2 and "the time limit is near" in run.output()
    assert all(after >= before for after, before in zip(resumed, saved, strict=True))
    assert resumed[3:] == saved[3:]
    assert run.shown()["Restarts"] == "5" and run.steps() == ALL_STEPS
    assert "killed by signal 9" in run.output() and "the head step is gone" in run.output()
    assert run.weights() == launched.weights()
    wait_for(lambda: not cluster.processes(str(tmp_path)), 30, "end of all processes")


def test_a_full_disk_ends_a_job_with_a_clear_state_and_the_run_goes_on_later(full_disk):
    run = full_disk
    assert "JobState=FAILED" in run.seen and "ExitCode=74:0" in run.seen, run.log()
    assert "is full; free some space" in run.seen  # in the job's comment
    assert f"the disk of {run.log_dir} is full" in run.output()
    shown = run.shown()
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("COMPLETED", "0:0", "1")
    assert run.resumed_after(1) == 5 and run.steps() == ALL_STEPS

"""What a user types on the login node: launch, status, and plain sbatch with a profile."""

from __future__ import annotations

import json
import shlex

import pytest
from slurm_jobs import STEPS

pytestmark = pytest.mark.timeout(600)


def test_a_launched_chain_trains_once_and_ends_early(launched):
    shown = [launched.shown(job) for job in (launched.job, launched.successor)]
    assert [(job["JobState"], job["ExitCode"]) for job in shown] == [("COMPLETED", "0:0")] * 2
    assert shown[0]["JobName"] == shown[1]["JobName"]
    assert launched.steps() == list(range(1, STEPS + 1))
    logs = launched.run_dir / "slurm"
    assert "nothing to do" in (logs / f"{launched.successor}.out").read_text()
    # Only one of them has trained.
    assert [path.name for path in logs.glob("*-*")] == [f"{launched.job}-0"]


def test_status_says_where_a_finished_run_stands(launched):
    igrpo = str(launched.site / "bin" / "igrpo")
    done = launched.login(igrpo, "status", str(launched.run_dir), "--json")
    status = json.loads(done.stdout)
    assert (status["state"], status["step"], status["checkpoint_step"]) == (
        "finished",
        STEPS,
        STEPS,
    )
    shown = launched.login(igrpo, "status", str(launched.run_dir)).stdout
    assert "COMPLETED" in shown and "nothing to do" in shown


def jobs_of(cluster, run):
    """How many jobs of the queue, past ones too, log in a run's folder."""
    return cluster.out("scontrol", "show", "job", "-o").count(f"StdOut={run.run_dir}/")


def test_a_finished_run_is_not_submitted_again_and_a_dry_run_submits_nothing(
    launched, cluster, run
):
    again = launched.login("bash", "slurm/train.sh", *launched.words())
    assert again.returncode == 0 and "nothing to submit" in again.stdout
    assert jobs_of(cluster, launched) == 2
    dry = run.login("bash", "slurm/train.sh", *run.words(), "--dry-run", SBATCH_ACCOUNT="physics")
    command = next(line for line in dry.stdout.splitlines() if line.startswith("sbatch "))
    assert {"--account=physics", "--nodes=1", "--requeue"} <= set(shlex.split(command))
    assert "#SBATCH --signal=B:USR1@" in dry.stdout and jobs_of(cluster, run) == 0


def test_what_does_not_fit_is_refused_before_it_is_in_the_queue(cluster, run):
    words = [w for w in run.words() if not w.startswith("grpo.num_prompts")]
    done = run.login("bash", "slurm/train.sh", *words, "grpo.num_prompts_per_step=99999999")
    assert done.returncode in (1, 2) and "error: " in done.stderr
    assert jobs_of(cluster, run) == 0


def test_a_profile_is_there_for_plain_sbatch_as_exports(cluster, run):
    igrpo = str(run.site / "bin" / "igrpo")
    run.install()
    profile = ("a100_5x8", "igrpo.site.account=physics", "igrpo.site.partition=wide5")
    done = run.login(igrpo, "launch", "--env", *profile)
    assert done.returncode == 0, done.stderr
    lines = dict(line.removeprefix("export ").split("=", 1) for line in done.stdout.splitlines())
    assert lines["SBATCH_ACCOUNT"] == "physics" and lines["SBATCH_PARTITION"] == "wide5"
    env = {name: shlex.split(value)[0] for name, value in lines.items() if shlex.split(value)}
    planned = run.login("sbatch", "--test-only", "slurm/train_igrpo_14b.sh", **env)
    assert planned.returncode == 0 and "in partition wide5" in planned.stderr

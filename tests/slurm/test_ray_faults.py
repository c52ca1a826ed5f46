"""Two nodes with Ray and the real `igrpo train`: from start to end, and through faults.

One job of three starts, since Ray takes its time to come up: a worker that never joins; a dead
raylet; then to the end.
"""

from __future__ import annotations

import json

import pytest
from slurm_jobs import BIN, FAKE_SECRETS, STEPS, TWO_NODES, Run
from virtual_slurm import wait_for

pytestmark = pytest.mark.timeout(1200)


class Story:
    """What was seen of the job on its way."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.without_worker: dict[str, str]
        self.commands: list[str]
        self.steps_at_raylet: list[int]


@pytest.fixture(scope="module")
def story(cluster, tmp_path_factory) -> Story:
    run = Run(cluster, tmp_path_factory.mktemp("story"))
    story = Story(run)
    deaf, impatient = run.folder / "deaf", run.folder / "impatient"
    run.install(
        ray=f"[[ $* == *start*--address=* && -e {deaf} ]] && exec sleep 600\n{BIN['ray']}",
        igrpo=f"[[ $2 == --job-settings && -e {deaf} ]] && cat {impatient}\n{BIN['igrpo']}",
    )
    deaf.touch()
    impatient.write_text("IGRPO_JOIN_TIMEOUT_S=2\n")
    run.close_gate(7)
    run.train(TWO_NODES, flags=("--nodes=2",), IGRPO_TEST_RAY=str(run.folder / "ray.json"))
    story.without_worker = run.wait_for_state("COMPLETED", "FAILED")

    deaf.unlink()
    cluster.out("scontrol", "requeue", run.job)
    run.wait_at_gate(7)
    story.commands = [process.command for process in cluster.processes()]
    story.steps_at_raylet = run.steps()
    run.kill("raylet/raylet", node="node2")

    run.wait_for_state("COMPLETED", "FAILED")
    return story


def test_a_worker_that_never_joins_ends_the_job_at_the_deadline(story):
    assert (story.without_worker["JobState"], story.without_worker["ExitCode"]) == (
        "FAILED",
        "69:0",
    )
    assert (
        "error: after 2 s node2 did not join Ray at 10.77.0.1:9900 (IGRPO_JOIN_"
        in story.run.output()
    )


def test_two_nodes_form_one_ray_that_strangers_cannot_enter(story):
    seen = json.loads((story.run.folder / "ray.json").read_text())
    assert seen["ran_on"] == ["node1", "node2"]
    assert seen["resources"]["worker_units"] == 4 and seen["resources"]["GPU"] == 4
    assert seen["resources"]["slurm_managed_ray_cluster"] == 2
    assert seen["ranks"] == {"node1": 1, "node2": 2}
    assert seen["without_token"] == "refused"


def test_a_dead_raylet_costs_at_most_the_steps_since_the_last_checkpoint(story):
    """The driver is told to end: in ten seconds the embedded engine can save, or it is killed."""
    assert story.steps_at_raylet == list(range(1, 8))
    assert story.run.resumed_after(2) in (5, 7)
    assert "a worker of Ray is gone" in story.run.output()


def test_the_job_completes_and_ends_like_an_undisturbed_one(story, launched):
    run, shown = story.run, story.run.shown()
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("COMPLETED", "0:0", "2")
    assert run.steps() == list(range(1, STEPS + 1)) and (run.run_dir / "finished").exists()
    assert run.weights() == launched.weights()


def test_nothing_is_left_behind(story, cluster):
    wait_for(
        lambda: not cluster.processes(f"igrpo-ray-{story.run.job}"), 30, "end of all processes"
    )
    assert not list(cluster.local.glob("igrpo-ray-*"))
    left = {path.name for path in story.run.run_dir.glob("slurm/*-2/*")}
    assert {"driver.log", "head.log", "worker-node2.log", "launcher.log", "settings.txt"} <= left
    assert "ray.token" not in left and not (story.run.run_dir / "slurm" / "job").exists()


def test_no_secret_is_in_a_file_or_in_an_argument(story):
    files = [path for path in story.run.folder.rglob("*") if path.is_file()]
    assert len(files) > 30 and len(story.commands) > 10
    for name, value in FAKE_SECRETS.items():
        assert not any(value in command for command in story.commands), name
        for path in files:
            assert value.encode() not in path.read_bytes(), f"{name} is in {path}"

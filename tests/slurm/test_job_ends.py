"""What the launcher makes of settings, of the preflight, and of the driver's exit code.

The driver is a line of shell here; the training itself is in the other files.
"""

from __future__ import annotations

import pytest
from slurm_jobs import CHECKOUT, FAKE_SECRETS, Run
from virtual_slurm import wait_for

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


def ended(run: Run) -> tuple[str, str]:
    shown = run.wait_for_state(*ENDED)
    return shown["JobState"], shown["ExitCode"]


def test_the_drivers_exit_code_is_the_jobs(run):
    run.install_stub(train="echo broken; exit 7")
    run.submit("a=1")
    assert ended(run) == ("FAILED", "7:0")
    assert "broken" in run.output() and "exit code 7" in run.output()
    assert not list(run.run_dir.glob("slurm/*/ray.token"))


def test_a_finished_driver_completes_the_job_and_the_next_job_does_nothing(run):
    gpus = f"echo $CUDA_VISIBLE_DEVICES >{run.folder}/gpus"
    run.install_stub(train=f"{gpus}; touch {run.run_dir}/finished")
    run.submit("a=1")
    assert ended(run) == ("COMPLETED", "0:0")
    assert (run.folder / "gpus").read_text() == "0,1,2,3,4,5,6,7\n"
    run.submit("a=1")
    assert ended(run) == ("COMPLETED", "0:0")
    assert "nothing to do" in run.output()
    assert len(list(run.run_dir.glob("slurm/*-0"))) == 1


def test_words_reach_settings_preflight_and_driver_as_they_are(run):
    note = f'printf "%s\\n" "$@" >>{run.folder}/words'
    run.install_stub(train=f"{note}; touch {run.run_dir}/finished", preflight=note, settings=note)
    words = ("a='x y'", "b=[1,2]", "c=$HOME;$(id)", "d=*")
    run.submit(*words, flags=("--time=1-00:00:00",))
    assert ended(run)[0] == "COMPLETED", run.log()
    told = (run.folder / "words").read_text().splitlines()
    settings = ["launch", "--job-settings", "--script", "slurm/train.sh"]
    head = [*settings, *words, "preflight", *words, "train", *words]
    assert told == head


def test_nemo_rl_is_told_when_it_has_to_have_saved(run):
    note = f'printf "%s\\n" "$@" >{run.folder}/words; touch {run.run_dir}/finished'
    run.install_stub(
        train=note, settings="echo IGRPO_ENGINE=nemo_rl_local; echo IGRPO_SAVE_MARGIN_S=3600"
    )
    run.submit("a=1", flags=("--time=1-00:00:00",), IGRPO_STARTUP_MARGIN_S="1800")
    assert ended(run)[0] == "COMPLETED", run.log()
    word = (run.folder / "words").read_text().splitlines()[-1]
    # Of 24 hours an hour and a half is kept back, and some seconds have passed.
    key, _, clock = word.partition("=")
    assert key == "checkpointing.checkpoint_must_save_by"
    assert "'00:22:29:00'" < clock <= "'00:22:30:00'"


@pytest.mark.parametrize(
    ("stub", "env", "flags", "message"),
    [
        ({"preflight": "echo does not fit; exit 1"}, {}, (), "does not fit"),
        ({"settings": "exit 2"}, {}, (), "settings of this job cannot be used"),
        ({"settings": "echo IGRPO_NUM_NODES=5"}, {}, (), "give sbatch --nodes=5"),
        ({"settings": "echo CONTAINER_IMAGE=a/b:c"}, {}, (), "has no pyxis"),
    ],
    ids=["preflight", "settings", "nodes", "container"],
)
def test_what_cannot_work_ends_with_2_before_anything_starts(run, stub, env, flags, message):
    run.install_stub(train=f"touch {run.folder}/started", **stub)
    run.submit("a=1", flags=flags, **env)
    assert ended(run) == ("FAILED", "2:0")
    assert message in run.output()
    assert not (run.folder / "started").exists()


def test_a_run_is_written_by_one_job_at_a_time(run):
    run.install_stub(train=f"touch {run.folder}/on; sleep 60")
    run.submit("a=1")
    first = run.job
    wait_for((run.folder / "on").exists, 30, "driver")
    run.submit("a=1")
    assert ended(run) == ("FAILED", "2:0")
    assert f"job {first} is at work" in run.output()
    run.cluster.out("scancel", first)
    # A cancelled job is not requeued, and its lock does not keep the next one out.
    run.install_stub(train=f"touch {run.run_dir}/finished")
    run.submit("a=1")
    assert ended(run)[0] == "COMPLETED", run.log()
    run.job = first
    assert run.state() == "CANCELLED" and run.shown()["Restarts"] == "0"


def test_stopped_without_the_marker_a_job_goes_back_to_the_queue(run):
    """Exit 0 is how NeMo-RL ends at its time limit; 75 is the embedded engine's code."""
    progress = f"mkdir -p {run.run_dir}/checkpoints/step_$SLURM_RESTART_COUNT"
    cases = (
        f"case ${{SLURM_RESTART_COUNT:=0}} in 2) touch {run.run_dir}/finished;; 1) {progress};; "
    )
    run.install_stub(train=f"{cases} 0) exit 75;; esac")
    run.submit("a=1")
    assert ended(run) == ("COMPLETED", "0:0")
    assert run.shown()["Restarts"] == "2"
    folders = sorted(path.name for path in run.run_dir.glob("slurm/*-*"))
    assert folders == [f"{run.job}-{number}" for number in range(3)]


def test_a_job_that_the_time_limit_ends_is_requeued_while_slurm_waits_to_kill_it(run):
    """Slurm itself does not requeue there. Its limits count in minutes: only its word is forged."""
    run.install_stub(
        train=f"[[ -n $SLURM_RESTART_COUNT ]] && touch {run.run_dir}/finished || "
        f"{{ touch {run.folder}/on; trap '' TERM; sleep 60; }}"
    )
    forged = "[[ $* == *%r ]] && exec echo TimeLimit"
    run.submit("a=1", **run.replace("squeue", forged, 'exec /usr/bin/squeue "$@"'))
    wait_for((run.folder / "on").exists, 60, "driver")
    run.signal("TERM")
    assert ended(run) == ("COMPLETED", "0:0")
    assert run.shown()["Restarts"] == "1" and "the time limit came before" in run.output()


def test_steps_that_are_told_to_end_send_the_job_back_to_the_queue(run):
    """The grace time of a preemption: Slurm signals the steps, but not the batch shell."""
    run.install_stub(
        train=f"[[ -n $SLURM_RESTART_COUNT ]] && touch {run.run_dir}/finished || "
        f"{{ touch {run.folder}/on; trap 'exit 1' TERM; sleep 60 & wait; }}"
    )
    run.submit("a=1")
    wait_for((run.folder / "on").exists, 60, "driver")
    run.cluster.out("scancel", "--signal=TERM", run.job)
    assert ended(run) == ("COMPLETED", "0:0")
    assert run.shown()["Restarts"] == "1" and "was told to end" in run.output()


def test_in_a_container_the_images_python_runs_the_driver(run):
    """srun is real; only the options that pyxis adds to it are taken off again."""
    note = f'printf "%s\\n" "$@" >{run.folder}/words; echo "$PYTHONPATH" >>{run.folder}/words'
    (run.folder / "nemo-rl.sqsh").touch()
    run.install_stub(settings=f"echo CONTAINER_IMAGE={run.folder}/nemo-rl.sqsh")
    run.replace("python", note, f"touch {run.run_dir}/finished")
    path = run.replace(
        "srun",
        '[[ $1 == --help ]] && exec echo "--container-image --container-env"',
        f'printf "%s\\n" "$@" >{run.folder}/srun',
        'for word; do shift; [[ $word == --*container* ]] || set -- "$@" "$word"; done',
        # What the image sets; a container inherits all else.
        "export PYTHONPATH=/of/the/image${PYTHONPATH:+:$PYTHONPATH}",
        'exec /usr/bin/srun "$@"',
    )
    run.submit("a=1", **path, PYTHONPATH="/of/the/host")
    assert ended(run)[0] == "COMPLETED", run.log()
    told = (run.folder / "words").read_text().splitlines()
    assert told == ["-m", "igrpo_nemo", "train", "a=1", f"{CHECKOUT}:/of/the/image"]
    given = (run.folder / "srun").read_text()
    assert f"--container-image={run.folder}/nemo-rl.sqsh" in given
    assert not any(value in given for value in FAKE_SECRETS.values())


def test_a_job_that_never_gets_anywhere_is_not_requeued_for_ever(run):
    run.install_stub(train="exit 75")
    run.submit("a=1", IGRPO_MAX_IDLE_RESTARTS="2")
    assert ended(run) == ("FAILED", "75:0")
    assert run.shown()["Restarts"] == "1" and "saved no new checkpoint" in run.output()


def test_where_slurm_does_not_requeue_the_next_job_of_a_chain_goes_on(run):
    run.install_stub(
        train=f"[[ -e {run.folder}/stopped ]] && touch {run.run_dir}/finished || "
        f"{{ touch {run.folder}/stopped; exit 75; }}"
    )
    disabled = "{ echo Requested operation is presently disabled >&2; exit 1; }"
    refused = f"[[ $1 == requeue ]] && {disabled}"
    path = run.replace("scontrol", refused, 'exec /usr/bin/scontrol "$@"')
    run.submit("a=1", flags=("--hold",), **path)
    first = run.job
    chained = (f"--dependency=afterok:{first}", "--kill-on-invalid-dep=yes")
    run.submit("a=1", flags=chained, **path)
    run.cluster.out("scontrol", "release", first)
    assert ended(run)[0] == "COMPLETED", run.log()
    assert (run.run_dir / "finished").exists()
    run.job = first
    assert run.shown()["ExitCode"] == "0:0" and "the next job of the chain" in run.output()


def test_a_chain_ends_with_the_first_real_failure(run):
    run.install_stub(train="exit 7")
    run.submit("a=1", flags=("--hold",))
    first = run.job
    run.submit("a=1", flags=(f"--dependency=afterok:{first}", "--kill-on-invalid-dep=yes"))
    run.cluster.out("scontrol", "release", first)
    assert ended(run)[0] == "CANCELLED"
    run.job = first
    assert run.shown()["ExitCode"] == "7:0"


def test_an_evaluation_is_a_python_program_of_the_checkout(run):
    note = f'printf "%s\\n" "$PWD" "$@" >{run.folder}/words'
    run.install_stub(settings=f'printf "%s\\n" "$@" >{run.folder}/asked')
    run.replace("python", note, "exit 3")
    words = ("--model", "a model", "eval=all_64", "cluster=a100_1x8", "igrpo.site.offline=false")
    run.submit(*words, script="evaluate.sh")
    assert ended(run) == ("FAILED", "3:0")
    told = (run.folder / "words").read_text().splitlines()
    assert told == [str(CHECKOUT), "pipelines/evaluate.py", *words]
    # `igrpo launch` knows which of the words are the profile's.
    asked = (run.folder / "asked").read_text().splitlines()
    assert asked == ["launch", "--job-settings", "--script", "slurm/evaluate.sh", *words]

"""One writer at a time; and a holder whose node died does not keep its run for ever."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fake_slurm import squeue_line

from igrpo_nemo.cluster.client import my_jobs
from igrpo_nemo.errors import UserError
from igrpo_nemo.run.lock import NAME, RunLock, has_no_nodes, writer_of

LIB = Path(__file__).parents[2] / "slurm" / "lib"
HOLDER = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(descriptor, fcntl.LOCK_EX)
os.ftruncate(descriptor, 0)
os.write(descriptor, sys.argv[2].encode())
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    """Has another process hold the lock, under the name of one that may be dead."""
    processes = []

    def hold(text: str) -> None:
        words = [sys.executable, "-c", HOLDER, str(tmp_path / NAME), text]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "held\n"

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


def environ(job: int, restart: int = 0) -> dict[str, str]:
    return {"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(restart)}


def test_the_lock_says_who_holds_it(tmp_path):
    lock = RunLock(tmp_path, environ(7, 2))
    host = socket.gethostname()
    assert (tmp_path / NAME).read_text() == f"pid {os.getpid()} on {host}, Slurm job 7, restart 2\n"
    with pytest.raises(UserError, match="this process"):
        RunLock(tmp_path, {})
    lock.release()
    lock.release()
    RunLock(tmp_path, {}).release()
    assert (tmp_path / NAME).read_text() == f"pid {os.getpid()} on {host}\n"


def test_an_earlier_start_of_the_same_job_is_dead(tmp_path, held, no_slurm):
    held("pid 3 on node1, Slurm job 7, restart 1\n")
    with pytest.raises(UserError, match=f"if that process is gone, remove {tmp_path / NAME}"):
        RunLock(tmp_path, environ(7, 1))
    with pytest.raises(UserError, match="being written by pid 3 on node1"):
        RunLock(tmp_path, environ(8, 5))
    RunLock(tmp_path, environ(7, 2)).release()


GONE, AWAY = "Invalid job id specified", "Unable to contact slurm controller"


@pytest.mark.parametrize(
    ("answer", "dead"),
    [
        *((state, True) for state in ("COMPLETED", "NODE_FAIL", "CANCELLED", "PENDING")),
        *((state, False) for state in ("RUNNING", "COMPLETING", "SUSPENDED")),
        *((GONE, True), (AWAY, False)),
    ],
)
def test_a_job_that_slurm_has_ended_or_forgotten_is_dead(tmp_path, held, slurm, answer, dead):
    """What Slurm does not answer proves nothing."""
    held("pid 3 on node1, Slurm job 7, restart 0\n")
    if answer in (GONE, AWAY):
        slurm.refuses("squeue", answer)
    else:
        slurm.answers("squeue", f"{answer}\n")
    if dead:
        RunLock(tmp_path, environ(8)).release()
    else:
        with pytest.raises(UserError, match="Slurm job 7, restart 0: wait until that run ends"):
            RunLock(tmp_path, environ(8))
    assert "--jobs=7" in slurm.calls("squeue")[0].words


def test_a_holder_on_this_host_is_alive(tmp_path, held, slurm):
    slurm.answers("squeue", "COMPLETED\n")
    held(f"pid 3 on {socket.gethostname()}, Slurm job 7, restart 0\n")
    with pytest.raises(UserError) as raised:
        RunLock(tmp_path, environ(7, 1))
    assert "remove" not in str(raised.value) and slurm.calls("squeue") == []


def test_a_lock_of_another_version_is_respected(tmp_path, held, no_slurm):
    held("something else")
    with pytest.raises(UserError, match="being written by something else"):
        RunLock(tmp_path, environ(7, 1))


def test_of_several_that_find_it_stale_one_gets_it(tmp_path, held, no_slurm):
    """Threads stand for nodes: POSIX locks belong to processes, so each has one of its own."""
    held("pid 3 on node1, Slurm job 7, restart 0\n")
    program = (
        "import sys, pathlib; from igrpo_nemo.errors import UserError\n"
        "from igrpo_nemo.run.lock import RunLock\n"
        "sys.stdin.readline()\n"
        "try: RunLock(pathlib.Path(sys.argv[1]),"
        " {'SLURM_JOB_ID': '7', 'SLURM_RESTART_COUNT': '1'}); print('got', flush=True)\n"
        "except UserError: print('busy', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    answers = []

    def race(racer):
        racer.stdin.write("\n")
        racer.stdin.flush()
        answers.append(racer.stdout.readline())

    threads = [threading.Thread(target=race, args=(racer,)) for racer in racers]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    assert sorted(answers) == ["busy\n"] * 5 + ["got\n"]


def test_asking_who_writes_takes_no_lock(tmp_path, held):
    assert writer_of(tmp_path) is None
    lock = RunLock(tmp_path, {})
    assert writer_of(tmp_path) == f"this process ({os.getpid()})"
    # Asking has not given it back.
    probe = "import sys; from igrpo_nemo.run.folder import RunFolder; RunFolder(sys.argv[1])"
    words = [sys.executable, "-c", probe, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert f"is being written by pid {os.getpid()}" in done.stderr
    lock.release()
    assert writer_of(tmp_path) is None
    held("pid 3 on node1")
    assert writer_of(tmp_path) == "pid 3 on node1"
    descriptor = os.open(tmp_path / NAME, os.O_RDWR)
    with pytest.raises(OSError):
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


def test_the_queue_as_data(slurm):
    slurm.answers(
        "squeue",
        squeue_line(7, "RUNNING", "a|b", nodes="node[1-2]", left="1-02:03:04")
        + squeue_line(8, "PENDING", reason="Dependency")
        + "garbage\n",
    )
    one, two = my_jobs()
    assert (one.id, one.name, one.nodes, one.left) == (7, "a|b", "node[1-2]", "1-02:03:04")
    assert one.active and two.active and two.reason == "Dependency"
    assert f"--user={os.getuid()}" in slurm.calls("squeue")[0].words


@pytest.mark.parametrize(
    ("state", "free"),
    [
        *((state, True) for state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")),
        *((state, False) for state in ("RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED")),
    ],
)
def test_a_job_and_its_process_judge_a_holder_alike(tmp_path, slurm, state, free):
    slurm.answers("squeue", f"{state}\n")
    assert has_no_nodes(7) is free
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "job").write_text("7\n")
    parts = "".join(f"source {LIB}/{part}.sh\n" for part in ("messages", "queue", "run_lock"))
    subprocess.run(
        ["bash", "-c", f"{parts}pause() {{ :; }}\n(take_run_lock)"],
        env={**os.environ, "IGRPO_RUN_DIR": str(tmp_path), "SLURM_JOB_ID": "12", "KIND": "train"},
        stdout=subprocess.DEVNULL,
    )
    assert (tmp_path / "slurm" / "job").read_text() == ("12\n" if free else "7\n")


def test_filters_of_the_shell_hide_no_job(slurm, monkeypatch):
    """Of other people's jobs a site may show nothing: that proves nothing."""
    slurm.answers("squeue", "")
    assert not has_no_nodes(7)
    monkeypatch.setenv("SQUEUE_PARTITION", "debug")
    slurm.answers("squeue", "RUNNING\n")
    assert not has_no_nodes(7) and not my_jobs()
    for call in slurm.calls("squeue"):
        assert not [name for name in call.environ if name.startswith("SQUEUE_")]

"""Functions of the launcher, called alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from slurm_jobs import CHECKOUT

LIB = CHECKOUT / "slurm" / "lib"


def bash(parts, line, **env):
    """What `line` prints, with the launcher's `parts` sourced."""
    sources = "".join(f"source {LIB}/{part}.sh\n" for part in parts.split())
    done = subprocess.run(
        ["bash", "-c", f"set -uo pipefail\n{sources}{line}"],
        env={"PATH": "/usr/bin:/bin", **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n")


def program(folder: Path, name: str, text: str) -> str:
    """Puts a program of shell into `folder`; the PATH that has it first."""
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


@pytest.mark.parametrize(
    ("clock", "seconds"),
    [
        ("1-02:03:04", "93784"),
        ("10:00:00", "36000"),
        ("08:09", "489"),
        ("3-00:00:08", "259208"),
        ("UNLIMITED", ""),
        ("NOT_SET", ""),
        ("INVALID", ""),
        ("", ""),
    ],
)
def test_time_left_is_read_as_squeue_writes_it(clock, seconds):
    assert bash("time_left", f"seconds_of '{clock}'") == seconds


def test_must_save_by_is_what_is_left_without_the_margins():
    line = "IGRPO_END_EPOCH=$(( $(date +%s) + 100000 )); must_save_by"
    clock = bash("time_left", line, IGRPO_SAVE_MARGIN_S="3000", IGRPO_STARTUP_MARGIN_S="1000")
    days, hours, minutes, seconds = map(int, clock.split(":"))
    left = 86400 * days + 3600 * hours + 60 * minutes + seconds
    assert 95990 <= left <= 96000 and len(clock) == 11
    assert bash("time_left", "must_save_by") == ""
    # Too late already: after the first step.
    assert bash("time_left", "IGRPO_END_EPOCH=$(date +%s); must_save_by") == "00:00:01:00"


@pytest.mark.parametrize(
    ("slurm", "wanted", "used"),
    [("16(x2)", "", 16), ("64(x3),48", "", 48), ("8,128(x4)", "", 8), ("64", "32", 32)],
)
def test_every_node_gets_the_cpus_that_all_have(slurm, wanted, used):
    env = {"SLURM_JOB_CPUS_PER_NODE": slurm, "CPUS_PER_NODE": wanted}
    assert bash("messages nodes", "find_cpus; echo $CPUS_PER_NODE", **env) == str(used)


def test_secrets_are_struck_out_of_a_log_and_the_rest_is_left(tmp_path):
    env = {
        "HF_TOKEN": "hf_a*b[c]$(d)",
        "OPENAI_API_KEY": "sk-0123456789",
        "AWS_SECRET_ACCESS_KEY": "wJalr/XUtn+FEMI",
        "TOKENS_PER_STEP": "1000000000",
        "RAY_AUTH_TOKEN_PATH": "/scratch/token",
    }
    log = tmp_path / "log"
    text = "x hf_a*b[c]$(d)sk-0123456789 y\nwJalr/XUtn+FEMI\n  1000000000 \\n /scratch/token\nend"
    bash("secrets", f'printf "%s" "$TEXT" | log_pump {log}', TEXT=text, **env)
    assert log.read_text() == "x ****** y\n***\n  1000000000 \\n /scratch/token\nend\n"


def test_a_full_disk_does_not_stop_the_writer_of_a_log():
    line = "for i in {1..20000}; do echo line $i; done | log_pump /dev/full; echo ${PIPESTATUS[*]}"
    assert bash("secrets", line) == "0 0"


def test_the_newest_checkpoint_counts_however_its_number_is_written(tmp_path):
    for name in ("step_00000008", "step_12", "step_9", ".saving_step_20", "step_x", "tmp_step_30"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert bash("requeue", "saved_step", IGRPO_RUN_DIR=str(tmp_path)) == "12"
    assert bash("requeue", "saved_step", IGRPO_RUN_DIR="/nowhere") == "0"


def test_a_container_gets_mounts_and_names_of_variables_but_no_values(tmp_path):
    for folder in ("data", "me", "igrpo", "hf"):
        (tmp_path / folder).mkdir()
    arguments = bash(
        "messages container",
        "SETTING_NAMES=(CUDA_X HF_HOME VENV); prepare_container; "
        "printf '%s\\n' \"${CONTAINER_ARGS[@]}\"",
        PATH=program(tmp_path, "srun", "echo --container-image --container-env"),
        CONTAINER_IMAGE="registry/nemo-rl:v0.7.0",
        CONTAINER_MOUNTS=f"{tmp_path}/data:/data:ro,{tmp_path}/me:/run",
        IGRPO_HOME=f"{tmp_path}/igrpo",
        KIND="train",
        IGRPO_RUN_DIR=f"{tmp_path}/me",
        IGRPO_CHECKPOINT_DIR=str(tmp_path / "fast"),
        NRL_MEGATRON_CHECKPOINT_DIR=str(tmp_path / "converted"),
        HF_HOME=f"{tmp_path}/hf",
        HF_TOKEN="hf_0123456789",
        NCCL_SOCKET_IFNAME="ib0",
        LD_LIBRARY_PATH="/x",
    ).splitlines()
    assert "--container-image=registry/nemo-rl:v0.7.0" in arguments
    mounts = f"{tmp_path}/data:/data:ro,{tmp_path}/me:/run"
    mounts += "".join(
        f",{tmp_path}/{x}:{tmp_path}/{x}" for x in ("igrpo", "me", "fast", "converted", "hf")
    )
    assert f"--container-mounts={mounts}" in arguments and (tmp_path / "fast").is_dir()
    [names] = [a.partition("=")[2].split(",") for a in arguments if "container-env" in a]
    assert {"CUDA_X", "HF_HOME", "HF_TOKEN", "NCCL_SOCKET_IFNAME", "IGRPO_RUN_DIR"} <= set(names)
    assert not {"PATH", "LD_LIBRARY_PATH", "VENV", "CONTAINER_IMAGE"} & set(names)
    assert not any("hf_0123456789" in argument for argument in arguments)


@pytest.mark.parametrize(
    ("image", "named", "left"),
    [("img", "", "::"), ("img", "LD_PRELOAD", "::/p.so"), ("", "", "/host:/lib:/p.so")],
)
def test_the_hosts_python_and_libraries_stay_out_of_a_container(tmp_path, image, named, left):
    """A container inherits what its image does not set; on bare metal the shell's are meant."""
    shown = 'echo "${PYTHONPATH:-}:${LD_LIBRARY_PATH:-}:${LD_PRELOAD:-}" >>$OUT'
    path = program(tmp_path, "srun", f"[[ $* == --help ]] && echo --container-image || {shown}")
    line = (
        f"SETTING_NAMES=({named}); prepare_container; NODES=(n1 n2); DRIVER=(true); "
        "needs_ray() { true; }; make_ray_token() { :; }; start_steps >/dev/null; wait"
    )
    env = dict.fromkeys(("IGRPO_RUN_DIR", "IGRPO_HOME", "IGRPO_LOG_DIR"), str(tmp_path))
    env |= {"KIND": "evaluate", "CPUS_PER_NODE": "1", "IGRPO_HEAD_NODE": "n1", "PATH": path}
    env |= {"CONTAINER_IMAGE": image, "OUT": str(tmp_path / "seen")}
    env |= {"IGRPO_GPUS_PER_NODE": "0", "IGRPO_NUM_NODES": "2"}
    line = f"export PYTHONPATH=/host LD_LIBRARY_PATH=/lib LD_PRELOAD=/p.so; {line}"
    bash("messages container steps", line, **env)
    assert (tmp_path / "seen").read_text().split() == [left] * 2


@pytest.mark.parametrize(
    ("named", "interfaces", "address"),
    [
        ("127.0.1.1", "10.1.2.3 fd00::1", "10.1.2.3"),
        ("127.0.1.1", "172.17.0.1 10.0.0.5", "10.0.0.5"),
        ("", "fe80::1 fd00::5 10.0.0.5", "10.0.0.5"),
        ("169.254.3.4 10.0.0.5", "10.0.0.5", "10.0.0.5"),
        ("", "192.168.122.1 172.18.0.1 169.254.3.4", "192.168.122.1"),
        ("10.0.0.7 127.0.0.1", "172.17.0.1 10.0.0.5", "10.0.0.7"),
        ("", "fe80::1", ""),
        ("", "", ""),
    ],
)
def test_the_address_is_one_that_others_reach(tmp_path, named, interfaces, address):
    program(tmp_path, "getent", f"for a in {named}; do echo $a STREAM gpu7; done")
    path = program(tmp_path, "hostname", f'[[ $* == -I ]] && echo "{interfaces}" || echo gpu7')
    assert bash("nodes", "own_address", PATH=path) == address
    died = bash("messages nodes", "(find_address) || echo $?", PATH=path)
    assert (
        "gpu7 has no IPv4 address that other nodes could reach: igrpo.site.interface" in died
    ) == (not address)


def test_the_address_towards_another_node_and_of_an_interface_come_first(tmp_path):
    """Loopback is the one network that every machine has: it is asked past the sieve."""
    path = program(tmp_path, "hostname", "echo 10.0.0.5")
    ask = f"python3() {{ echo 10.9.9.9; echo $* >>{tmp_path}/asked; }}; own_address node2"
    assert bash("nodes", ask, PATH=path) == "10.9.9.9"
    assert bash("nodes", ask, PATH=path, IGRPO_INTERFACE="ib0") == "10.9.9.9"
    asked = (tmp_path / "asked").read_text().split()
    assert asked[1:3] + asked[4:] == ["towards", "node2", "of", "ib0"]
    for words in (["towards", "127.0.0.1"], ["of", "lo"]):
        done = subprocess.run([sys.executable, LIB / "address.py", *words], capture_output=True)
        assert done.stdout == b"127.0.0.1\n"
    for words in (["towards", "no such host"], ["of", "no-such-0"]):
        done = subprocess.run([sys.executable, LIB / "address.py", *words], capture_output=True)
        assert (done.returncode, done.stdout) == (0, b"")


@pytest.mark.parametrize(
    ("kind", "folder"), [("train", "/run/checkpoints"), ("evaluate", "/elsewhere")]
)
def test_a_checkpoint_folder_that_needs_no_mount_gets_none(kind, folder):
    line = "find_own_folders; echo ${OWN_FOLDERS[*]-}"
    env = {"KIND": kind, "IGRPO_RUN_DIR": "/run", "IGRPO_CHECKPOINT_DIR": folder}
    assert bash("messages container", line, **env) == ""


def test_a_checkpoint_folder_that_cannot_be_made_stops_the_job(tmp_path):
    (tmp_path / "file").touch()
    env = {"KIND": "train", "IGRPO_RUN_DIR": "/run", "IGRPO_CHECKPOINT_DIR": f"{tmp_path}/file/a"}
    told = bash("messages container", "(find_own_folders) 2>&1; echo $?", **env).splitlines()
    assert f"error: cannot make {tmp_path}/file/a" in told[-2] and told[-1] == "2"


@pytest.mark.parametrize(
    ("image", "mounts", "told"),
    [
        ("/none/nemo-rl.sqsh", "", "CONTAINER_IMAGE: there is no /none/nemo-rl.sqsh"),
        ("./nemo-rl.sqsh", "", "CONTAINER_IMAGE: there is no ./nemo-rl.sqsh"),
        (
            "nvcr.io#nvidia/nemo-rl:v0.7.0",
            "/tmp:/a,/none:/b:ro",
            "there is no /none",
        ),
        ("nvcr.io#nvidia/nemo-rl:v0.7.0", "/tmp:/a,volume:/b", ""),
    ],
)
def test_a_container_whose_files_are_not_there_stops_the_job(tmp_path, image, mounts, told):
    env = {"CONTAINER_IMAGE": image, "CONTAINER_MOUNTS": mounts, "KIND": "train"}
    env |= {
        "IGRPO_HOME": "/tmp",
        "IGRPO_RUN_DIR": "/tmp",
        "IGRPO_CHECKPOINT_DIR": "/tmp/checkpoints",
    }
    env["PATH"] = program(tmp_path, "srun", "echo --container-image")
    said = bash("messages container", "(prepare_container) 2>&1; echo $?", **env).splitlines()
    assert said[-1] == ("2" if told else "0") and told in " ".join(said)


QUEUE = "messages queue time_left requeue run_lock"
SILENT = "echo squeue: error: Unable to contact slurm controller >&2; exit 1"
QUICK = {"ASK_TRIES": "3", "ASK_PAUSE": "0.01", "SLURM_JOB_ID": "12", "KIND": "train"}


def silent_at_first(folder: Path, answer: str) -> str:
    """A command of Slurm's that answers from the third call on."""
    return f"echo x >>{folder}/calls; (($(wc -l <{folder}/calls) > 2)) || {{ {SILENT}; }}; {answer}"


def test_slurm_is_asked_again_until_it_answers(tmp_path):
    answer = "echo a warning >&2; echo ${SQUEUE_PARTITION:-no filter}; echo $*"
    path = program(tmp_path, "squeue", silent_at_first(tmp_path, answer))
    env = {**QUICK, "PATH": path, "SQUEUE_PARTITION": "other"}
    assert bash(QUEUE, "ask_queue -j 7", **env) == "no filter\n-h -j 7"
    assert len((tmp_path / "calls").read_text().split()) == 3


@pytest.mark.parametrize(
    ("squeue", "code"),
    [(SILENT, 1), ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", 0)],
)
def test_no_answer_is_not_the_answer_that_there_is_no_job(tmp_path, squeue, code):
    env = {**QUICK, "PATH": program(tmp_path, "squeue", squeue)}
    assert bash(QUEUE, "said=$(state_of 7); echo $?:$said", **env) == f"{code}:"


def test_a_job_is_requeued_though_slurm_was_silent(tmp_path):
    program(tmp_path, "squeue", SILENT)
    path = program(tmp_path, "scontrol", silent_at_first(tmp_path, f"echo $* >{tmp_path}/told"))
    line = "end_steps() { :; }; pause() { :; }; FIRST_STEP=0; requeue 75 stopped"
    (tmp_path / "slurm").mkdir()
    said = bash(QUEUE, line, PATH=path, IGRPO_RUN_DIR=str(tmp_path), **QUICK)
    assert (tmp_path / "told").read_text() == "requeue 12\n"
    assert "scontrol requeue: squeue: error: Unable to contact" in said


@pytest.mark.parametrize(("answer", "code"), [("true", "0"), ("echo it is disabled; exit 1", "75")])
def test_a_job_that_waits_for_another_goes_back_at_its_time_limit(tmp_path, answer, code):
    env = {
        **QUICK,
        "PATH": program(tmp_path, "scontrol", f'echo "$*" >>{tmp_path}/asked; {answer}'),
    }
    line = "pause() { :; }; (trap on_time_limit USR1; kill -USR1 $BASHPID; echo on); echo $?"
    said = bash(f"{QUEUE} watch", line, **env).splitlines()
    assert said[-1] == code and "on" not in said
    assert (tmp_path / "asked").read_text() == "requeue 12\n"


def test_a_slurm_that_refuses_to_requeue_is_not_asked_again(tmp_path):
    refusal = f"echo x >>{tmp_path}/calls; echo Requested operation is presently disabled; exit 1"
    env = {**QUICK, "PATH": program(tmp_path, "scontrol", refusal)}
    assert bash(QUEUE, "send_back 12; echo $?", **env).endswith("\n1")
    assert (tmp_path / "calls").read_text() == "x\n"


def lock_after(folder: Path, squeue: str) -> tuple[list[str], str]:
    """What a job says that finds the lock of job 7, with its exit code; and whose lock it is."""
    lock = folder / "slurm" / "job"
    lock.parent.mkdir()
    lock.write_text("7\n")
    path = program(folder, "squeue", squeue)
    line = "pause() { :; }; (take_run_lock); echo $?"
    said = bash(QUEUE, line, PATH=path, IGRPO_RUN_DIR=str(folder), **QUICK).splitlines()
    return said, lock.read_text().strip()


def test_a_lock_is_not_taken_where_slurm_does_not_answer(tmp_path):
    said, holder = lock_after(tmp_path, SILENT)
    assert "Slurm does not answer: is job 7 at work" in said[0] and said[-1] == "2"
    assert holder == "7"


@pytest.mark.parametrize("state", ["", "PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"])
def test_a_lock_of_a_job_that_has_no_nodes_is_taken(tmp_path, state):
    assert lock_after(tmp_path, f"echo {state}") == (["0"], "12")


def test_a_job_that_ends_is_waited_for_as_long_as_it_takes(tmp_path):
    count = f"echo x >>{tmp_path}/calls; (($(wc -l <{tmp_path}/calls) > 120)) || echo COMPLETING"
    said, holder = lock_after(tmp_path, count)
    assert [line.partition("waiting for job ")[2] for line in said[:-1]] == [
        f"7, which ends, to leave {tmp_path}"
    ]
    assert (said[-1], holder) == ("0", "12")


def concluded(folder: Path, parts: str, line: str, **env: str) -> str:
    """How the launcher ends a run: `CODE:reason` of a requeue, or `finish CODE`."""
    ends = (
        'requeue() { echo "$1:$2"; exit; }; finish() { echo "finish $1"; exit; }; '
        "show_tail() { :; }; KIND=train"
    )
    folders = {"IGRPO_LOG_DIR": str(folder), "IGRPO_RUN_DIR": str(folder)}
    return bash(f"messages {parts}", f"{ends}; {line}; conclude", **folders, **env).splitlines()[-1]


@pytest.mark.parametrize(
    ("lost", "driver", "step", "ending"),
    [
        ("", "70", 70, "69:Ray lost a process of the run: exit code 70"),
        ("", "", 70, "69:Ray lost a process of the run: exit code 70"),
        ("a worker is gone", "7", 143, "69:a worker is gone: it said nothing"),
        ("", "75", 75, "75:the driver stopped with its state saved"),
        ("", "7", 7, "finish 7"),
    ],
)
def test_a_run_that_ray_broke_goes_back_to_the_queue(tmp_path, lost, driver, step, ending):
    if driver:
        (tmp_path / "driver.exit").write_text(f"{driver}\n")
    assert concluded(tmp_path, "watch", f"LOST='{lost}' STEP_CODE={step}") == ending


@pytest.mark.parametrize(
    ("started", "env", "ending"),
    [
        (False, {}, "finish 69"),
        (False, {"SLURM_RESTART_COUNT": "1"}, "69:the head step is gone: exit code 1"),
        (True, {}, "69:the head step is gone: exit code 1"),
        (False, {"CONTAINER_IMAGE": ""}, "69:the head step is gone: exit code 1"),
    ],
)
def test_a_container_that_never_started_is_not_waited_for_again(tmp_path, started, env, ending):
    if started:
        (tmp_path / "head.started").touch()
    env = {"CONTAINER_IMAGE": "nvcr.io#nvidia/nemo-rl:v7", **env}
    assert concluded(tmp_path, "requeue watch", "LOST= STEP_CODE=1", **env) == ending


@pytest.mark.parametrize(
    ("name", "waits"), [("igrpo-demo-1", True), ("igrpo-demo-1-convert", False)]
)
def test_only_the_next_training_job_goes_on_with_the_run(tmp_path, name, waits):
    """What evaluates the run waits for the job too."""
    # As the real one, it lists the jobs of that name; all without one.
    squeue = (
        f'[[ " $* " == *" -n "* && " $* " != *" -n {name} "* ]] || echo "afterok:12(unfulfilled)"'
    )
    env = {**QUICK, "SLURM_JOB_NAME": "igrpo-demo-1", "PATH": program(tmp_path, "squeue", squeue)}
    said = bash(QUEUE, "has_successor && echo yes || echo no", **env)
    assert said == ("yes" if waits else "no")


@pytest.mark.parametrize(
    ("step", "ending"), [("head", "75:the job was told to end"), ("worker", "69:a worker of Ray")]
)
def test_a_worker_that_is_told_to_end_does_not_speak_for_the_job(tmp_path, step, ending):
    """Where one worker dies, Slurm sends SIGTERM to the others of its step (--kill-on-bad-exit)."""
    line = (
        f"(STEP={step}; trap on_step_terminated TERM; kill -TERM $BASHPID; exit 3) & "
        "WORKER_STEP=$!; cd $IGRPO_LOG_DIR; "
        "(until [[ -e over || -e terminated ]]; do pause 0.1; done) & HEAD_STEP=$!; watch_steps"
    )
    assert concluded(tmp_path, "driver steps watch", line).startswith(ending)


@pytest.mark.parametrize(("ray", "code"), [("sleep 1", 70), ("sleep 30", 7)])
def test_a_driver_that_fails_as_ray_goes_down_has_no_exit_code(tmp_path, ray, code):
    """Ray's head ends a moment after the driver; or it does not, and the code is the driver's."""
    line = (
        f"keep_ray_logs() {{ :; }}; DRIVER=; DRIVER_CODE=7; {ray} & RAY=$!; "
        "(await_ray_end; exit $DRIVER_CODE); echo $?; kill $RAY 2>/dev/null || true"
    )
    said = bash("messages driver", line, IGRPO_LOG_DIR=str(tmp_path)).splitlines()
    assert said[-1] == str(code)


def test_the_head_step_leaves_by_itself_and_ends_its_driver(tmp_path):
    """A signal to srun would kill the step at once, and Ray's folder would stay on the node."""
    line = (
        f"head() {{ (trap 'touch {tmp_path}/saved; exit' TERM; "
        "for i in {1..300}; do pause 0.1; done) & DRIVER=$!; "
        f"trap 'exit 9' TERM; trap 'touch {tmp_path}/left' EXIT; "
        "IGRPO_USE_RAY=0; watch_driver; }\n"
        "(head) & HEAD_STEP=$!; pause 0.3; end_steps; exit_code $HEAD_STEP; echo $?"
    )
    assert bash("messages driver steps", line, IGRPO_LOG_DIR=str(tmp_path)) == "70"
    assert (tmp_path / "saved").exists() and (tmp_path / "left").exists()

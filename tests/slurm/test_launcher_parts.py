"""Functions of the launcher, called alone."""

from __future__ import annotations

import subprocess

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
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\necho --container-image --container-env\n")
    srun.chmod(0o755)
    arguments = bash(
        "messages container",
        "SETTING_NAMES=(CUDA_X HF_HOME VENV); prepare_container; "
        "printf '%s\\n' \"${CONTAINER_ARGS[@]}\"",
        PATH=f"{tmp_path}:/usr/bin:/bin",
        CONTAINER_IMAGE="registry/nemo-rl:v0.7.0",
        CONTAINER_MOUNTS="/data:/data:ro,/scratch/me:/run",
        IGRPO_HOME="/home/me/igrpo",
        IGRPO_RUN_DIR="/scratch/me",
        HF_HOME="/data/hf",
        HF_TOKEN="hf_0123456789",
        NCCL_SOCKET_IFNAME="ib0",
        LD_LIBRARY_PATH="/x",
    ).splitlines()
    assert "--container-image=registry/nemo-rl:v0.7.0" in arguments
    mounts = "/data:/data:ro,/scratch/me:/run,/home/me/igrpo:/home/me/igrpo"
    assert f"--container-mounts={mounts},/scratch/me:/scratch/me,/data/hf:/data/hf" in arguments
    [names] = [a.partition("=")[2].split(",") for a in arguments if "container-env" in a]
    assert {"CUDA_X", "HF_HOME", "HF_TOKEN", "NCCL_SOCKET_IFNAME", "IGRPO_RUN_DIR"} <= set(names)
    assert not {"PATH", "LD_LIBRARY_PATH", "VENV", "CONTAINER_IMAGE"} & set(names)
    assert not any("hf_0123456789" in argument for argument in arguments)


def test_a_host_that_calls_itself_loopback_still_finds_its_address(tmp_path):
    for name, text in {
        "hostname": 'case "$*" in -I) echo 10.1.2.3 fd00::1;; *) echo gpu7;; esac',
        "getent": "echo 127.0.1.1 STREAM gpu7; echo 127.0.1.1 DGRAM",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    assert bash("nodes", "own_address", PATH=f"{tmp_path}:/usr/bin:/bin") == "10.1.2.3"

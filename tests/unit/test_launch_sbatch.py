"""The sbatch command line, the settings of a job and the exports: text from config and profile."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from cases import cases
from composed import load_config

from igrpo_nemo.cluster.job import Submission, job_name, sbatch_command
from igrpo_nemo.cluster.site import assignments, exports, job_settings, sbatch_environment
from igrpo_nemo.config.igrpo_keys import Site
from igrpo_nemo.errors import UserError

CASES = cases(__file__)


CLUSTER = ["engine=nemo_rl", "cluster=a100_2x8", "policy.model_name=/models/7b"]
SITE = Site(
    gpu="a100_80gb",
    account="acc",
    partition="batch",
    qos="high",
    constraint="a&b",
    reservation="r",
    time="1-00:00:00",
    save_margin_s=900,
)


def config(folder: Path, *overrides: str, site: Site = SITE):
    composed = load_config([*CLUSTER, f"logger.log_dir={folder}", *overrides])
    return composed.replaced("igrpo", site=site)


def settings_of(folder: Path, site: Site, checkout: Path, **environ: str):
    return job_settings(config(folder, site=site), checkout, environ)


def command(folder: Path, site: Site = SITE, after: int | None = None, *overrides: str):
    words = ("experiment=x", *overrides)
    composed = config(folder, *overrides, site=site)
    return sbatch_command(Submission(composed, folder, Path("slurm/train.sh"), words), after)


def test_every_value_of_the_profile_becomes_an_option(tmp_path):
    run = tmp_path / "my run"
    assert command(run) == [
        "sbatch",
        "--parsable",
        f"--job-name={job_name(run)}",
        "--nodes=2",
        "--gpus-per-node=8",
        "--account=acc",
        "--partition=batch",
        "--qos=high",
        "--constraint=a&b",
        "--reservation=r",
        "--time=1-00:00:00",
        "--signal=B:USR1@900",
        "--requeue",
        "--open-mode=append",
        f"--output={run}/slurm/%j.out",
        "--dependency=singleton",
        "slurm/train.sh",
        "experiment=x",
    ]


def test_what_is_not_set_is_left_to_the_script(tmp_path):
    words = command(tmp_path, Site(gpu="a100_80gb"))
    assert not [w for w in words if w.startswith(("--account", "--time", "--partition"))]
    assert "--gpus-per-node=0" in command(tmp_path, Site(gpu="cpu"))


def test_a_job_of_a_chain_awaits_the_one_before(tmp_path):
    words = command(tmp_path, SITE, 17)
    assert "--dependency=afterok:17,singleton" in words and "--kill-on-invalid-dep=yes" in words


def test_further_options_come_last_and_words_stay_whole(tmp_path):
    site = SITE.model_copy(update={"sbatch": ["--gpus-per-node=0", "--gres=gpu:8"]})
    overrides = "data.train.data_path='a b.jsonl'"
    words = command(tmp_path, site, None, overrides)
    at = words.index("slurm/train.sh")
    assert words[at - 2 : at] == ["--gpus-per-node=0", "--gres=gpu:8"]
    assert words[at + 1 :] == ["experiment=x", overrides]


def test_a_percent_sign_in_the_run_folder_is_no_pattern(tmp_path):
    run = tmp_path / "50%j"
    assert f"--output={tmp_path}/50%%j/slurm/%j.out" in command(run)


@pytest.mark.parametrize(
    ("site", "overrides", "expected"),
    [
        (Site(time="00:10:00"), [], "igrpo.site.time=00:10:00 is not longer than"),
        (SITE, ["data.train.data_path='a\nb'"], "holds a character that a job script"),
        (SITE, ["logger.log_dir='a\\\\b'"], "Slurm takes no backslash there"),
    ],
)
def test_what_slurm_cannot_carry_is_refused(tmp_path, site, overrides, expected):
    with pytest.raises(UserError, match=expected):
        command(tmp_path, site, None, *overrides)


def test_job_names_are_the_runs_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = tmp_path / "a" / "run 1", tmp_path / "b" / "run 1"
    assert (
        job_name(one).startswith("igrpo-run-1-") and len(job_name(one)) == len("igrpo-run-1-") + 8
    )
    assert job_name(one) != job_name(other)
    assert job_name(Path("a/run 1")) == job_name(one)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert job_name(tmp_path / "link" / "run 1") == job_name(one)


@pytest.mark.parametrize(("kept", "dropped"), CASES["what_a_job_inherits"])
def test_what_a_job_inherits(kept, dropped):
    assert sbatch_environment({**kept, **dropped}) == kept


def in_a_shell(text: str, *names: str) -> list[str]:
    shown = "; ".join(f'printf "%s\\0" "${{{name}}}"' for name in names)
    done = subprocess.run(
        ["bash", "-c", f"set -u\n{text}\n{shown}"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split("\0")[:-1]


def test_settings_survive_the_shell(tmp_path):
    site = Site(
        gpu="a100_80gb",
        container="nvcr.io#nvidia/nemo-rl:v0.7.0",
        mounts=["/a:/b", "/c:/d:ro"],
        env={"ODD": 'it\'s $HOME `x` "y" \\z', "TORCH_CUDA_ARCH_LIST": "8.0;8.6"},
        venv="env",
    )
    settings = settings_of(tmp_path / "run", site, Path("/checkout"))
    assert list(settings)[:17] == [
        "IGRPO_RUN_DIR", "IGRPO_CHECKPOINT_DIR", "IGRPO_ENGINE", "IGRPO_NUM_NODES",
        "IGRPO_GPUS_PER_NODE", "IGRPO_SAVE_MARGIN_S", "IGRPO_MAX_RESTARTS", "CONTAINER_IMAGE",
        "CONTAINER_MOUNTS", "VENV", "HF_HOME", "NRL_MEGATRON_CHECKPOINT_DIR", "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE", "WANDB_MODE", "TORCH_CUDA_ARCH_LIST", "CPUS_PER_NODE",
    ]  # fmt: skip
    names = [name for name in settings if name != "TORCH_CUDA_ARCH_LIST"]
    assert in_a_shell(assignments(settings), *names) == [settings[name] for name in names]
    assert settings["IGRPO_RUN_DIR"] == str(tmp_path / "run")
    assert settings["IGRPO_CHECKPOINT_DIR"] == str(tmp_path / "run" / "checkpoints")
    assert (settings["IGRPO_NUM_NODES"], settings["IGRPO_GPUS_PER_NODE"]) == ("2", "8")
    assert settings["VENV"] == "/checkout/env" and settings["HF_HOME"] == ""
    assert settings["TORCH_CUDA_ARCH_LIST"] == "8.0;8.6"


CONVERSIONS = "NRL_MEGATRON_CHECKPOINT_DIR"
SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "WANDB_MODE")


@pytest.mark.parametrize(("site", "environ", "expected"), CASES["settings_follow_the_profile"])
def test_settings_follow_the_profile(site, environ, expected):
    settings = settings_of(Path("runs/a"), Site(**site), Path("/checkout"), **environ)
    assert {name: settings[name] for name in expected} == expected


@pytest.mark.parametrize(("env", "expected"), CASES["not_printed"])
def test_values_that_must_not_be_printed_are_refused(tmp_path, env, expected):
    with pytest.raises(UserError, match=expected) as raised:
        assignments(settings_of(tmp_path, Site(env=env), tmp_path))
    assert "pass@" not in str(raised.value) and "hf_" not in str(raised.value)


def test_exports_are_what_sbatch_reads():
    site = SITE.model_copy(update={"container": "img#1", "mounts": ["/a:/b"], "env": {"A": "b c"}})
    text = exports(site)
    assert all(line.startswith("export ") for line in text.splitlines())
    values = dict(shlex.split(line)[1].split("=", 1) for line in text.splitlines())
    assert values == {
        "SBATCH_ACCOUNT": "acc", "SBATCH_PARTITION": "batch", "SBATCH_QOS": "high",
        "SBATCH_CONSTRAINT": "a&b", "SBATCH_RESERVATION": "r", "SBATCH_TIMELIMIT": "1-00:00:00",
        "CONTAINER_IMAGE": "img#1", "CONTAINER_MOUNTS": "/a:/b", "HF_HUB_OFFLINE": "1",
        "SBATCH_SIGNAL": "B:USR1@900", "A": "b c",
    }  # fmt: skip

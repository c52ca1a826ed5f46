"""The shipped cluster profiles are made from ours, and NeMo-Skills takes them as they are."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from skills_runs import CHECKOUT, evaluate, pipeline, write_problems

from igrpo_nemo.cluster.site import VARIABLES
from igrpo_nemo.config.igrpo_keys import Site
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.skills.cluster import (
    cluster_profile,
    cluster_values,
    sbatch_options,
)
from igrpo_nemo.evaluation.skills.program import SkillsEnvironment, child_environ

PROFILES = CHECKOUT / "configs" / "cluster_configs"


@pytest.mark.parametrize("name", ["local", "slurm_a100", "slurm_h100"])
def test_shipped_profiles_are_the_commands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if (CHECKOUT / "cluster.local.yaml").exists():
        pytest.skip("cluster.local.yaml changes the profiles of this checkout")
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    shipped = (PROFILES / f"{name}.yaml").read_text()
    made_by = shipped.splitlines()[1].partition("pipelines/cluster_config.py ")[2]
    ended = pipeline("cluster_config.py", *made_by.split())
    assert ended.code == 0 and ended.out == shipped


def test_a_site_becomes_a_profile() -> None:
    site = Site(
        gpu="a100_80gb",
        account="acc",
        partition="gpu",
        time="08:00:00",
        container="/images/nemo-rl.sqsh",
        mounts=["/lustre:/lustre:ro", "/scratch/me:/space"],
        hf_home="/lustre/hf",
        offline=False,
        env={"NCCL_DEBUG": "WARN"},
        qos="high",
        reservation="r",
    )
    values = cluster_values(site, workspace="/space")
    assert values["executor"] == "slurm" and values["dependency_type"] == "afterok"
    assert (values["account"], values["partition"]) == ("acc", "gpu")
    assert values["default_timeout"] == "08:00:00" and values["job_dir"] == "/space/nemo_run"
    # What is mounted already is not mounted again; NeMo-Skills reads no third part of a mount.
    assert values["mounts"] == ["/lustre:/lustre", "/scratch/me:/space"]
    assert values["containers"]["nemo-rl"] == "/images/nemo-rl.sqsh"
    assert values["containers"]["vllm"] == "/space/images/vllm.sqsh"
    assert values["env_vars"] == ["HF_HOME=/lustre/hf", "NCCL_DEBUG=WARN"]
    assert sbatch_options(site) == {"qos": "high", "reservation": "r"}
    assert cluster_values(Site(gpu="cpu"))["executor"] == "none"


def test_a_value_that_nemo_skills_cannot_read() -> None:
    with pytest.raises(UserError, match="igrpo.site.env.X=a=b"):
        cluster_values(Site(gpu="a100_80gb", env={"X": "a=b"}))


def test_profiles_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are local, slurm_a100"):
        cluster_profile("nosuch", PROFILES)
    with pytest.raises(UserError, match="leave out --cluster"):
        cluster_profile("local", PROFILES)
    with pytest.raises(UserError, match="names no account"):
        cluster_profile("slurm_a100", PROFILES).check_own()
    mine = {"executor": "slurm", "account": "acme", "job_dir": f"{tmp_path}/none/nemo_run"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine))
    with pytest.raises(UserError, match=f"there is no {tmp_path}/none: make one of your own"):
        cluster_profile("mine", tmp_path).check_own()
    (tmp_path / "broken.yaml").write_text("a list\n")
    with pytest.raises(UserError, match="is no cluster profile"):
        cluster_profile("broken", tmp_path)


READ = """
import json, sys
from nemo_skills.pipeline.utils import get_cluster_config, get_env_variables, get_mounts_from_config
out, sys.stdout = sys.stdout, sys.stderr
for name in sys.argv[2:]:
    config = get_cluster_config(name, sys.argv[1])
    read = [config["executor"], get_mounts_from_config(config), get_env_variables(config)]
    print(json.dumps(read), file=out)
"""


@pytest.mark.timeout(600)
def test_nemo_skills_reads_the_shipped_profiles(skills: SkillsEnvironment, tmp_path: Path) -> None:
    environ = {**child_environ(skills.bin, os.environ), "NEMORUN_HOME": str(tmp_path)}
    done = subprocess.run(
        [skills.python, "-c", READ, PROFILES, "local", "slurm_a100"],
        capture_output=True,
        text=True,
        timeout=600,
        env=environ,
    )
    assert done.returncode == 0, done.stderr
    local, slurm = (json.loads(line) for line in done.stdout.splitlines())
    assert local[0] == "none" and slurm[:2] == ["slurm", ["/workspace:/workspace"]]
    assert slurm[2]["HF_HOME"] == "/workspace/hf" and slurm[2]["HF_HUB_OFFLINE"] == "1"


@pytest.mark.timeout(600)
def test_a_dry_run_on_slurm(skills: SkillsEnvironment, tmp_path: Path, monkeypatch) -> None:
    """The real NeMo-Skills takes profile and arguments; no secret reaches its logs or files."""
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("WANDB_API_KEY", "wandb_verysecret")
    site = Site(gpu="a100_80gb", account="acc", partition="gpu")
    profile = cluster_values(site, workspace=str(tmp_path))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(profile))
    write_problems(tmp_path / "data", "toy", ["4", "5"])
    model = tmp_path / "model"
    model.mkdir()
    shape = {"num_attention_heads": 28, "max_position_embeddings": 131_072}
    (model / "config.json").write_text(json.dumps(shape))
    ended = evaluate(
        *("--model", str(model), "--cluster", "mine", "--config-dir", str(tmp_path)),
        *("--data-dir", str(tmp_path / "data"), "--benchmarks", "toy:4", "--jobs", "2"),
        *("--out", str(tmp_path / "out"), "--dry-run"),
        env=skills.bin.parent,
    )
    assert ended.code == 0, ended.err
    assert "--server_gpus=4" in ended.out and "--num_jobs=2" in ended.out
    (log,) = (tmp_path / "out" / "eval-logs").glob("ns-*.log")
    text = " ".join(log.read_text().split())
    assert "++inference.random_seed=3" in text and "serve_vllm" in text
    for file in (f for f in tmp_path.rglob("*") if f.is_file()):
        assert "verysecret" not in file.read_text(errors="replace"), file
    assert "verysecret" not in ended.out + ended.err
    assert not (tmp_path / "out" / "submitted.json").exists()

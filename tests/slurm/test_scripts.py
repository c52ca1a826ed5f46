"""The shipped scripts: what they ask Slurm for, and how they are submitted."""

from __future__ import annotations

import re
import subprocess

import pytest
from slurm_jobs import CHECKOUT, HERE

from igrpo_nemo.config import load_config

SCRIPTS = {
    "train_igrpo_7b.sh": 2,
    "train_grpo_7b.sh": 2,
    "train_igrpo_14b.sh": 5,
    "train_grpo_14b.sh": 5,
    "train_igrpo_nemotron_h_8b.sh": 2,
    "train.sh": 1,
    "evaluate.sh": 1,
}
"""Nodes of eight GPUs each."""

SMALLER = {5: "wide4", 2: "wide1"}


def test_no_script_is_forgotten_here():
    names = {path.name for path in (CHECKOUT / "slurm").glob("*.sh")}
    assert names == {*SCRIPTS, "ray_cluster.sh"}


@pytest.mark.parametrize(("script", "nodes"), SCRIPTS.items())
def test_slurm_takes_a_script_where_it_fits_and_nowhere_else(cluster, script, nodes):
    def planned(partition):
        words = ("sbatch", "--test-only", f"--partition={partition}", f"slurm/{script}")
        return cluster.run(*words, cwd=CHECKOUT)

    fits = planned(f"wide{nodes}")
    assert fits.returncode == 0 and f"partition wide{nodes}" in fits.stderr
    # Fewer nodes, or nodes of four GPUs.
    for partition in filter(None, (SMALLER.get(nodes), "narrow5")):
        refused = planned(partition)
        assert refused.returncode != 0
        assert "Requested node configuration is not available" in refused.stderr


def test_shellcheck_finds_nothing(cluster):
    command = ["shellcheck", "--severity=style"]
    launcher = [CHECKOUT / "slurm" / "ray_cluster.sh", *(CHECKOUT / "slurm" / "lib").glob("*.sh")]
    scripts = [*(CHECKOUT / "slurm" / name for name in SCRIPTS), HERE / "virtual_cluster.sh"]
    for files, option in ((launcher, "--external-sources"), (scripts, "--exclude=SC1091")):
        done = subprocess.run(
            [*command, option, *map(str, files)], capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("allocation", [{}, {"SLURM_JOB_ID": "1"}], ids=["login", "salloc"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_in_a_users_shell_a_script_hands_itself_to_igrpo_launch(script, allocation, tmp_path):
    igrpo = tmp_path / "bin" / "igrpo"
    igrpo.parent.mkdir()
    igrpo.write_text('#!/bin/bash\nprintf "%s\\n" "$PWD" "$@"\n')
    igrpo.chmod(0o755)
    done = subprocess.run(
        ["bash", str(CHECKOUT / "slurm" / script), "grpo.seed=1", "a b"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "VENV": str(tmp_path), **allocation},
        capture_output=True,
        text=True,
        timeout=60,
    )
    where, *words = done.stdout.splitlines()
    assert where == str(CHECKOUT)
    assert words == ["launch", "--script", f"slurm/{script}", "grpo.seed=1", "a b"]


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name.startswith("train_")])
def test_a_named_script_names_an_experiment_of_its_shape(script):
    text = (CHECKOUT / "slurm" / script).read_text()
    [name] = re.findall(r"^EXPERIMENT=(.+)$", text, re.M)
    cluster = load_config([f"experiment={name}"]).cluster
    assert (cluster.num_nodes, cluster.gpus_per_node) == (SCRIPTS[script], 8)


def test_away_from_the_checkout_a_script_says_so(tmp_path):
    copy = tmp_path / "slurm_script"  # as Slurm's spool folder has it
    copy.write_text((CHECKOUT / "slurm" / "train.sh").read_text())
    done = subprocess.run(
        ["bash", str(copy)],
        env={"PATH": "/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "submit from the checkout" in done.stdout

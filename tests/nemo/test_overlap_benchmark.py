"""The benchmark of the overlaps, on NeMo-RL's real rollouts and the CPU double of its engine."""

from __future__ import annotations

import json

import gpu_overlap
import nemo_runs


def test_all_ways_are_measured(policy_folder, ray_cluster, tmp_path, monkeypatch):
    from igrpo_nemo.nemo import setup

    monkeypatch.setattr(setup, "trainer", setup.trainer)  # it is put back behind the test
    file = tmp_path / "overlap.json"
    words = [
        *nemo_runs.TASK,
        "engine=nemo_rl_local",
        "model=hf",
        nemo_runs.ASYNC,
        f"policy.model_name={policy_folder}",
        f"logger.log_dir={tmp_path / 'run'}",
        "grpo.num_prompts_per_step=4",
        "grpo.max_num_steps=8",
    ]
    with nemo_runs.shared_environments():
        assert gpu_overlap.main(["--repeats", "1", "--json", str(file), *words]) == 0
    result = json.loads(file.read_text())
    assert result["ratios"].keys() == {"grpo", "barrier", "pipelined", "fused first", "fused"}
    assert result["ratios"]["grpo"] == 1 and min(result["seconds"].values()) > 0
    tokens = {way: runs[0]["tokens"] for way, runs in result["runs"].items()}
    assert min(tokens.values()) > 0
    assert tokens["fused first"] > tokens["pipelined"], "it draws the next step's drafts too"

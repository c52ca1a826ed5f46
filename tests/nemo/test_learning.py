"""In fifteen steps NeMo-RL's loop learns what the embedded engine learns: the answer format."""

from __future__ import annotations

import nemo_runs

SETTING = [
    "data.train.num_problems=96",
    "grpo.max_num_epochs=9",
    "grpo.max_num_steps=15",
    "igrpo.sample_table_period=0",
]


def test_both_engines_raise_the_reward_alike(ray_cluster, policy_folder, tmp_path):
    """Mean reward of the trained rows: first two steps against the last five, on both engines."""
    from igrpo_nemo.local.trainer import train as train_locally

    nemo_runs.train(nemo_runs.tiny_config(policy_folder, tmp_path / "nemo", *SETTING))
    local = nemo_runs.tiny_config(policy_folder, tmp_path / "local", *SETTING, "engine=local")
    assert train_locally(local) == 0
    gains = []
    for name in ("nemo", "local"):
        rewards = [each["igrpo/trained_reward"] for each in nemo_runs.metrics(tmp_path / name)]
        assert len(rewards) == 15
        first, last = sum(rewards[:2]) / 2, sum(rewards[-5:]) / 5
        gains.append(last - first)
    assert min(gains) > 0.25
    assert abs(gains[0] - gains[1]) < 0.2

"""A policy that diverges ends the run of NeMo-RL's trainer; its last good checkpoint stays."""

from __future__ import annotations

from unittest import mock

import nemo_runs
import pytest
import torch

from igrpo_nemo.errors import NonFiniteError
from igrpo_nemo.nemo.launch import train

SAVING = ["checkpointing.enabled=true", "checkpointing.save_period=1", "grpo.max_num_steps=3"]


@pytest.mark.either_tree
@pytest.mark.parametrize("broken", ["loss", "grad_norm"])
def test_a_step_that_is_no_number_is_not_saved(ray_cluster, policy_folder, tmp_path, broken):
    from igrpo_nemo.nemo.cpu.policy import LocalPolicy

    config = nemo_runs.tiny_config(policy_folder, tmp_path, *SAVING)
    update, calls = LocalPolicy.train, []

    def trained(policy, *args, **kwargs):
        results = update(policy, *args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            results[broken] = torch.full_like(torch.as_tensor(results[broken]), float("nan"))
        return results

    with (
        mock.patch.object(LocalPolicy, "train", trained),
        nemo_runs.shared_environments(),
        pytest.raises(NonFiniteError, match=r"step 2: .* is not finite; .*step_1; begin") as caught,
    ):
        train(config)
    assert caught.value.exit_code == 76
    assert [each.name for each in (tmp_path / "checkpoints").iterdir() if each.is_dir()] == [
        "step_1"
    ]
    assert not (tmp_path / "finished").exists()

"""NeMo-RL's own `grpo_train` with iGRPO in it: what it trains on, by objective, N, G and engine."""

from __future__ import annotations

import nemo_runs
import pytest
from nemo_runs import ASYNC, SYNC

CASES = [
    pytest.param(4, 4, "grpo", SYNC, id="4-4-grpo-sync"),
    pytest.param(2, 4, "gspo", ASYNC, id="2-4-gspo-async", marks=pytest.mark.either_tree),
    pytest.param(4, 2, "dapo", ASYNC, id="4-2-dapo-async"),
]


@pytest.mark.parametrize(("drafts", "refinements", "objective", "engine"), CASES)
def test_exactly_the_refinements_are_trained_under_their_q_prime(
    ray_cluster, policy_folder, tmp_path, drafts, refinements, objective, engine
):
    """Rows, masks and groups of every step, as NeMo-RL itself wrote them to its dump."""
    config = nemo_runs.tiny_config(
        policy_folder,
        tmp_path / "run",
        f"objective={objective}",
        f"igrpo.num_drafts={drafts}",
        f"igrpo.num_refinements={refinements}",
        engine,
        "grpo.max_num_epochs=9",
    )
    seen = nemo_runs.train(config)

    assert len(nemo_runs.metrics(tmp_path / "run")) == 2
    known = {
        (group.prompt.token_ids, completion.token_ids): score.reward
        for call in seen.rollouts
        for rollout in call
        for group in rollout.refinements
        for completion, score in zip(group.completions, group.scores, strict=True)
    }
    for call in seen.rollouts:
        for rollout in call:
            assert len(rollout.drafts.completions) == drafts
            [group] = rollout.refinements
            assert len(group.completions) == refinements
    for step in (1, 2):
        rows = nemo_runs.dump(tmp_path / "run", step)
        assert len(rows) == 8 * refinements
        assert any(advantage != 0 for row in rows for advantage in row["advantages"])
        groups: dict[tuple[int, ...], int] = {}
        for row in rows:
            context, completion = nemo_runs.trained(row)
            assert (context, completion) in known
            groups[context] = groups.get(context, 0) + 1
        assert set(groups.values()) == {refinements} or objective != "grpo"
        assert sum(groups.values()) == 8 * refinements
        assert all(count % refinements == 0 for count in groups.values())


@pytest.mark.either_tree
def test_a_resumed_run_equals_an_uninterrupted_one(ray_cluster, policy_folder, tmp_path):
    """Weights bit for bit, and the log line of every step, after 2 + 2 steps and after 4."""
    from safetensors.torch import load_file

    saving = ["checkpointing.enabled=true", "checkpointing.save_period=2", "grpo.max_num_epochs=2"]
    whole = nemo_runs.tiny_config(
        policy_folder, tmp_path / "whole", *saving, "grpo.max_num_steps=4"
    )
    nemo_runs.train(whole)
    parts = tmp_path / "parts"
    nemo_runs.train(nemo_runs.tiny_config(policy_folder, parts, *saving, "grpo.max_num_steps=2"))
    assert (parts / "finished").exists()
    nemo_runs.train(nemo_runs.tiny_config(policy_folder, parts, *saving, "grpo.max_num_steps=4"))

    weights = "checkpoints/step_4/policy/weights/model.safetensors"
    ours, theirs = load_file(parts / weights), load_file(tmp_path / "whole" / weights)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    stable = ("loss", "igrpo/draft_reward", "igrpo/refinement_reward", "lr", "grad_norm")
    pairs = list(zip(nemo_runs.metrics(parts), nemo_runs.metrics(tmp_path / "whole"), strict=True))
    assert len(pairs) == 4
    for ours, theirs in pairs:
        assert [ours[name] for name in stable] == [theirs[name] for name in stable]

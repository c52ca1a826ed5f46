"""A feedback that the project does not know: its path in the config makes it train."""

from __future__ import annotations

import pytest
import tiny_runs
from every_draft import PATH

from igrpo_nemo.config import RolloutBudget, load_config
from igrpo_nemo.errors import UserError


def test_a_feedback_is_a_class_and_its_path(tmp_path):
    policy = tiny_runs.tiny_policy(tmp_path / "policy")
    options = (f"igrpo.feedback={PATH}", "grpo.max_num_steps=1")
    config = tiny_runs.tiny_config(policy, tmp_path / "run", *options)
    seen = tiny_runs.run(config)
    (rollouts,) = seen.rollouts
    assert len(rollouts) == 4
    for rollout in rollouts:
        assert [len(group.completions) for group in rollout.refinements] == [2, 2]
        prompts = [group.prompt.token_ids for group in rollout.refinements]
        assert rollout.drafts.prompt.token_ids not in prompts and len(set(prompts)) > 1
    (metrics,) = tiny_runs.learned(tmp_path / "run")
    assert metrics["igrpo/nonzero_advantage_groups"] > 0
    assert not tiny_runs.same_weights(seen.weights[0], seen.final)
    budget = RolloutBudget.of(config)
    assert (budget.drafts, budget.refinements, budget.trained_rows) == (16, 16, 16)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("igrpo.num_drafts=1", "igrpo.num_drafts=1: a group needs"),
        ("igrpo.feedback=no_such", "igrpo.feedback='no_such' should be 'none' or 'best_draft' or"),
    ],
)
def test_its_own_contradictions_and_unknown_names_are_one_line(override, message):
    options = [f"igrpo.feedback={PATH}", "igrpo.budget=null", override]
    with pytest.raises(UserError) as error:
        load_config(["experiment=demo", *options])
    assert message in str(error.value) and "\n" not in str(error.value)

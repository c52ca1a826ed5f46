"""A feedback that the project does not know trains by its path; what remembers resumes."""

from __future__ import annotations

import pytest
import tiny_runs
from every_draft import PATH

from igrpo_nemo.config import RolloutBudget


def test_a_feedback_is_a_class_and_its_path(policy, tmp_path):
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
    budget = RolloutBudget(config)
    assert (budget.drafts, budget.refinements, budget.trained_rows) == (16, 16, 16)


def test_what_remembers_earlier_steps_resumes_with_them(policy, tmp_path):
    """Bit for bit: the curriculum leaves out of the second epoch what the first one measured, and
    what Stage 2 is shown depends on the solutions of the steps before."""

    def config(name):
        options = ("feedback=self_verification_short", "igrpo.feedback_options.buffer_age=2")
        options += ("igrpo.curriculum_keep=0.2", "data.train.num_problems=12")
        return tiny_runs.tiny_config(policy, tmp_path / name, *options, "grpo.max_num_epochs=4")

    def killed(step):
        if step == 5:
            raise KeyboardInterrupt

    whole = tiny_runs.run(config("whole"))
    with pytest.raises(KeyboardInterrupt):
        tiny_runs.run(config("resumed"), before_update=killed)
    rest = tiny_runs.run(config("resumed"))
    kept = tiny_runs.learned(tmp_path / "whole")
    assert kept[0]["data/left_out"] == 0.0 < kept[-1]["data/left_out"]
    remembered = [[each.selection.remembered for each in step] for step in whole.rollouts]
    assert not any(remembered[0]) and sum(map(len, remembered)) == 24
    assert sum(each is not None for step in remembered for each in step) > 10
    assert [tiny_runs.texts(step) for step in rest.rollouts] == [
        tiny_runs.texts(step) for step in whole.rollouts[4:]
    ]
    assert tiny_runs.same_weights(rest.final, whole.final)
    assert tiny_runs.learned(tmp_path / "resumed") == kept

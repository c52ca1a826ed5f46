"""A feedback that the project does not know: one class and its name make it train."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import pytest
import tiny_runs

from igrpo_nemo.config import RolloutBudget, load_config
from igrpo_nemo.errors import UserError
from igrpo_nemo.feedback import FEEDBACKS, NextPrompt
from igrpo_nemo.feedback.protocol import group_name, rows_of_group, too_small
from igrpo_nemo.types import Selection, Stage


@dataclass(frozen=True, slots=True)
class EveryDraft:
    """Shows each draft to one refinement, and trains a problem's refinements as one group."""

    num_drafts: int
    two_stage = True
    trains_drafts = False
    repeats_question = False

    @classmethod
    def of(cls, igrpo: Any, seed: int) -> Self:
        return cls(igrpo.num_drafts)

    @property
    def num_refinements(self) -> int:
        return self.num_drafts

    @property
    def num_trained(self) -> int:
        return self.num_drafts

    def problems(self) -> Iterator[str]:
        yield from too_small("igrpo.num_drafts", self.num_drafts)

    def select(self, drafts, step):
        return Selection(index=None, rule="every")

    def next_prompts(self, drafts, selection, prompts):
        shown = (prompts.refinement(drafts.problem, draft.text) for draft in drafts.completions)
        return tuple(NextPrompt(prompt, 1) for prompt in shown)

    def training_rows(self, rollout):
        name = group_name(rollout.problem.id, Stage.REFINE)
        return [row for group in rollout.refinements for row in rows_of_group(group, name)]


@pytest.fixture
def every_draft(monkeypatch):
    monkeypatch.setitem(FEEDBACKS, "every_draft", EveryDraft)


def test_a_feedback_is_a_class_and_its_name(every_draft, tmp_path):
    policy = tiny_runs.tiny_policy(tmp_path / "policy")
    options = ("igrpo.feedback=every_draft", "grpo.max_num_steps=1")
    config = tiny_runs.tiny_config(policy, tmp_path / "run", *options)
    seen = tiny_runs.run(config)
    (rollouts,) = seen.rollouts
    assert len(rollouts) == 4
    for rollout in rollouts:
        assert [len(group.completions) for group in rollout.refinements] == [1, 1, 1, 1]
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
def test_its_own_contradictions_and_unknown_names_are_one_line(every_draft, override, message):
    options = ["igrpo.feedback=every_draft", "igrpo.budget=null", override]
    with pytest.raises(UserError) as error:
        load_config(["experiment=demo", *options])
    assert message in str(error.value) and "\n" not in str(error.value)

from collections import Counter

import pytest

from igrpo_nemo.feedback import BestDraft, NoFeedback
from igrpo_nemo.prompts import PromptBuilder, PromptProfile, TokenBudget
from igrpo_nemo.types import Rollout, Stage


@pytest.fixture
def prompts(tokenizer):
    return PromptBuilder(tokenizer, PromptProfile("S", "\n", "draft"), TokenBudget(400, 40))


def rollout_of(feedback, drafts, prompts, make_group, step=1):
    selection = feedback.select(drafts, step)
    refinements = tuple(
        make_group([0] * n.num_samples, stage=Stage.REFINE, prompt=n.prompt.token_ids)
        for n in feedback.next_prompts(drafts, selection, prompts)
    )
    return Rollout(drafts.problem, drafts, selection, refinements)


@pytest.mark.parametrize(
    ("rewards", "truncated", "expected"),
    [
        ([0, 2, 1, 2], (), 1),
        ([0, 0, 0], (), 0),
        ([1, 2, 2], (1,), 2),
        ([2, 1, 1], (0,), 0),
        ([0, 0], (0,), 1),
    ],
)
def test_best_is_the_arg_max_first_index_truncated_last(make_group, rewards, truncated, expected):
    drafts = make_group(rewards, truncated=truncated)
    assert BestDraft(len(rewards), 2).select(drafts, 1).index == expected


def test_truncated_drafts_rank_equally_when_told_so(make_group):
    drafts = make_group([1, 2, 2], truncated=(1,))
    assert BestDraft(3, 2, rank_truncated_last=False).select(drafts, 1).index == 1


def test_worst_is_the_arg_min(make_group):
    assert BestDraft(3, 2, draft_choice="worst").select(make_group([1, 0, 2]), 1).index == 1


def test_random_choices_are_seeded_by_step_and_problem_and_cover_all(make_group):
    feedback = BestDraft(4, 2, draft_choice="random", seed=3)
    group = make_group([0, 1, 2, 1])
    picks = [feedback.select(group, step).index for step in range(400)]
    assert picks == [feedback.select(group, step).index for step in range(400)]
    counts = Counter(picks)
    assert set(counts) == {0, 1, 2, 3} and min(counts.values()) > 60


def test_random_tie_break_stays_among_the_best(make_group):
    feedback = BestDraft(4, 2, tie_break="random")
    picks = {feedback.select(make_group([2, 0, 2, 2]), step).index for step in range(60)}
    assert picks == {0, 2, 3}


@pytest.mark.parametrize(
    ("option", "index", "num_prompts"),
    [("condition", 0, 1), ("skip", None, 0), ("no_draft", None, 1)],
)
def test_all_drafts_at_zero(make_group, prompts, option, index, num_prompts):
    feedback = BestDraft(3, 2, on_all_zero=option, train_stages=(Stage.DRAFT, Stage.REFINE))
    drafts = make_group([0, 0, 0])
    selection = feedback.select(drafts, 1)
    following = feedback.next_prompts(drafts, selection, prompts)
    assert selection.index == index and len(following) == num_prompts
    if option == "no_draft":
        assert following[0].prompt == drafts.prompt
    rows = feedback.training_rows(rollout_of(feedback, drafts, prompts, make_group))
    assert bool(rows) == (option != "skip")


def test_draft_dropout_drops_about_its_share(make_group):
    feedback = BestDraft(2, 2, draft_dropout=0.25)
    dropped = sum(feedback.select(make_group([1, 0]), s).index is None for s in range(2000))
    assert 420 < dropped < 580


def test_q_refined_shows_the_selected_draft(make_group, prompts):
    drafts = make_group([0, 2], texts=["wrong one", "right one"])
    feedback = BestDraft(2, 3)
    (following,) = feedback.next_prompts(drafts, feedback.select(drafts, 1), prompts)
    assert "right one" in following.prompt.text and "wrong one" not in following.prompt.text
    assert following.num_samples == 3


def test_only_refinements_are_trained_under_q_refined(make_group, prompts):
    feedback = BestDraft(4, 3)
    rollout = rollout_of(feedback, make_group([0, 1, 2, 0]), prompts, make_group)
    rows = feedback.training_rows(rollout)
    assert len(rows) == feedback.num_trained == 3
    assert {row.context_ids for row in rows} == {rollout.refinements[0].prompt.token_ids}
    assert {row.stage for row in rows} == {Stage.REFINE} and len({row.group for row in rows}) == 1


def test_training_both_stages_keeps_two_groups_with_their_own_contexts(make_group, prompts):
    feedback = BestDraft(4, 3, train_stages=(Stage.DRAFT, Stage.REFINE))
    rollout = rollout_of(feedback, make_group([0, 1, 2, 0]), prompts, make_group)
    rows = feedback.training_rows(rollout)
    assert len(rows) == feedback.num_trained == 7
    contexts = {row.group: row.context_ids for row in rows}
    assert len(contexts) == 2
    assert {row.context_ids for row in rows if row.stage is Stage.DRAFT} == {(1, 2)}


def test_no_feedback_trains_the_whole_budget_under_q(make_group, prompts):
    feedback = NoFeedback(8)
    rollout = rollout_of(feedback, make_group([0, 1] * 4), prompts, make_group)
    rows = feedback.training_rows(rollout)
    assert not rollout.refinements and len(rows) == feedback.num_trained == feedback.num_drafts == 8
    assert {row.context_ids for row in rows} == {(1, 2)}

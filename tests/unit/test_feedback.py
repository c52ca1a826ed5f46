import json
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from cases import cases

from igrpo_nemo.errors import UserError
from igrpo_nemo.feedback import (
    FEEDBACKS,
    BestDraft,
    Critique,
    Exemplar,
    NoFeedback,
    SelfVerification,
    feedback_class,
)
from igrpo_nemo.feedback.baselines import ExemplarOptions
from igrpo_nemo.feedback.best_draft import BestDraftOptions
from igrpo_nemo.feedback.critique import CritiqueOptions
from igrpo_nemo.feedback.protocol import memory_of
from igrpo_nemo.prompts import PromptBuilder, PromptProfile, TokenBudget
from igrpo_nemo.types import Rollout, Stage, Target

CASES = cases(__file__)


@pytest.fixture
def prompts(tokenizer):
    return PromptBuilder(tokenizer, PromptProfile("S", "\n", "draft"), TokenBudget(900, 40))


def rollout_of(feedback, drafts, prompts, make_group, step=1, rewards=(0,)):
    """`rewards` of the refinements, one for each prompt, or one for all."""
    selection = feedback.select(drafts, step)
    following = feedback.next_prompts(drafts, selection, prompts)
    rewards = rewards if len(rewards) > 1 else rewards * len(following)
    refinements = tuple(
        make_group([reward] * n.num_samples, stage=Stage.REFINE, prompt=n.prompt.token_ids)
        for n, reward in zip(following, rewards, strict=True)
    )
    return Rollout(drafts.problem, drafts, selection, refinements)


@pytest.mark.parametrize(("rewards", "truncated", "options", "expected"), CASES["chosen"])
def test_which_draft_is_chosen(make_group, rewards, truncated, options, expected):
    """The arg max, first index; truncated drafts last; the arg min."""
    drafts = make_group(rewards, truncated=truncated)
    assert BestDraft(len(rewards), 2, **options).select(drafts, 1).index == expected


def test_random_choices_are_seeded_by_step_and_problem_and_cover_all(make_group):
    feedback = BestDraft(4, 2, draft_choice="random", seed=3)
    group = make_group([0, 1, 2, 1])
    picks = [feedback.select(group, step).index for step in range(400)]
    assert picks == [feedback.select(group, step).index for step in range(400)]
    for other, drafts in (
        (BestDraft(4, 2, draft_choice="random", seed=4), group),
        (feedback, make_group([0, 1, 2, 1], problem_id="q")),
    ):
        assert picks != [other.select(drafts, step).index for step in range(400)]
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


@pytest.mark.parametrize(
    ("feedback", "contexts"),
    [
        (BestDraft(4, 3), {Stage.REFINE: 3}),
        (
            BestDraft(4, 3, train_stages=(Stage.DRAFT, Stage.REFINE)),
            {Stage.DRAFT: 4, Stage.REFINE: 3},
        ),
        (SelfVerification(4, 4, seed=7), {Stage.DRAFT: 4, Stage.REFINE: 4}),
        (NoFeedback(4), {Stage.DRAFT: 4}),
    ],
)
def test_each_trained_stage_is_a_group_under_its_own_context(
    make_group, prompts, feedback, contexts
):
    rollout = rollout_of(feedback, make_group([0, 1, 2, 0]), prompts, make_group)
    rows = feedback.training_rows(rollout)
    assert len(rows) == feedback.num_trained and Counter(row.stage for row in rows) == contexts
    shown = {group.prompt.token_ids for group in rollout.refinements}
    assert len(shown) == feedback.two_stage
    for stage in contexts:
        own = [row for row in rows if row.stage is stage]
        assert {row.context_ids for row in own} == ({(1, 2)} if stage is Stage.DRAFT else shown)
        assert len({row.group for row in own}) == 1
    assert len({row.group for row in rows}) == len(contexts)
    assert all(row.weight == 1 and not row.shaped for row in rows)


def test_each_prompt_of_stage_2_has_a_group_of_its_own(make_group):
    drafts = make_group([0, 2])
    refined = tuple(make_group([0, 1], stage=Stage.REFINE, prompt=(n,)) for n in (5, 6))
    rows = BestDraft(2, 4).training_rows(Rollout(drafts.problem, drafts, None, refined))
    assert len({row.group for row in rows}) == len({(r.group, r.context_ids) for r in rows}) == 2


class TestSelfVerification:
    """Four solutions, four verdicts."""

    feedback = SelfVerification(4, 4, seed=7)

    def test_right_and_wrong_solutions_alternate_and_all_are_shown(self, make_group):
        drafts = make_group([0, 2, 0, 2])
        picks = [self.feedback.select(drafts, step) for step in range(400)]
        assert picks == [self.feedback.select(drafts, step) for step in range(400)]
        assert min(Counter(pick.index for pick in picks).values()) > 60
        assert 160 < sum(pick.rule == "right" for pick in picks) < 240
        mostly_wrong = make_group([0, 0, 0, 2])
        rights = sum(self.feedback.select(mostly_wrong, step).index == 3 for step in range(400))
        assert 160 < rights < 240

    @pytest.mark.parametrize(
        ("rewards", "word", "reward"),
        [([2, 2, 2, 0], "yes", 0.5), ([2, 0, 0, 0], "yes", 1.5), ([2] * 4, "yes", 0.0),
         ([0] * 4, "no", 0.0), ([0, 2, 2, 2], "no", 1.5), ([0, 0, 0, 2], "no", 0.5)],
    )  # fmt: skip
    def test_a_verdict_earns_more_the_less_it_was_to_be_expected(
        self, make_group, prompts, rewards, word, reward
    ):
        """2 (1 - p) for a right yes, 2 p for a right no."""
        drafts = make_group(rewards)
        wanted = next(
            selection
            for step in range(100)
            if drafts.scores[(selection := self.feedback.select(drafts, step)).index].correct
            == (word == "yes")
        )
        (following,) = self.feedback.next_prompts(drafts, wanted, prompts)
        assert following.target == Target(word, ("yes", "no"), reward)
        assert following.num_samples == 4
        assert f"text {wanted.index}" in following.prompt.text

    def test_without_room_for_the_question_there_is_no_verdict(self, make_group, tokenizer):
        tight = PromptBuilder(tokenizer, PromptProfile("S", "\n", "draft"), TokenBudget(80, 40))
        drafts = make_group([0, 2], prompt=tight.question(make_group([0]).problem).token_ids)
        selection = self.feedback.select(drafts, 1)
        assert self.feedback.next_prompts(drafts, selection, tight) == ()


class TestSolutionBuffer:
    """Self-Verification that remembers two steps."""

    def feedback(self, **options):
        options = {"buffer_age": 2, **options}
        return SelfVerification.of(igrpo_of("self_verification", feedback_options=options), 7)

    def remember(self, feedback, make_group, steps, size=2):
        for step in steps:
            drafts = make_group([2] + [0] * (size - 1), problem_id=f"p{step}")
            feedback.memory.add([Rollout(drafts.problem, drafts)], step)

    def test_a_verdict_may_be_about_a_solution_of_an_earlier_step(self, make_group, prompts):
        feedback = self.feedback()
        self.remember(feedback, make_group, [1], size=4)
        drafts = make_group([0] * 4)
        picks = [feedback.select(drafts, step) for step in range(2, 202)]
        rights = [pick for pick in picks if pick.rule == "right"]
        assert 60 < len(rights) < 140 and all(pick.remembered == 0 for pick in rights)
        assert {pick.remembered for pick in picks} == {None, 0, 1, 2, 3}
        assert {pick.index for pick in picks} == {None, 0, 1, 2, 3}
        assert all((pick.index is None) != (pick.remembered is None) for pick in picks)
        (following,) = feedback.next_prompts(drafts, rights[0], prompts)
        assert following.target == Target("yes", ("yes", "no"), 1.5)
        remembered = feedback.memory.solutions[0]
        assert remembered.problem.question in following.prompt.text and remembered.share == 0.25

    def test_solutions_are_kept_by_age_and_by_number(self, make_group):
        feedback = self.feedback(buffer_size=3)
        self.remember(feedback, make_group, [1, 2])
        kept = [(each.step, each.right) for each in feedback.memory.solutions]
        assert kept == [(1, False), (2, True), (2, False)]
        self.remember(feedback, make_group, [4])
        assert [each.step for each in feedback.memory.solutions] == [4, 4]

    def test_its_state_is_plain_and_comes_back(self, make_group):
        feedback, again = self.feedback(), self.feedback()
        self.remember(feedback, make_group, [1, 2])
        again.memory.load_state_dict(json.loads(json.dumps(feedback.memory.state_dict())))
        assert again.memory.solutions == feedback.memory.solutions
        assert memory_of(SelfVerification(4, 4)) is None


class TestCritique:
    """Four answers, four refinements, the best of which is kept."""

    feedback = Critique(4, 4)

    def test_each_answer_is_criticised_and_refined_once(self, make_group, prompts):
        drafts = make_group([0, 2, 0, 2])
        selection = self.feedback.select(drafts, 1)
        assert selection.shown == (0, 1, 2, 3)
        following = self.feedback.next_prompts(drafts, selection, prompts)
        assert [each.num_samples for each in following] == [1] * 4
        assert all(each.target is None for each in following)
        for i, each in enumerate(following):
            assert f"text {i}" in each.prompt.text
            assert ("is correct" in each.prompt.text) == (i % 2 == 1)
            assert ("is incorrect" in each.prompt.text) == (i % 2 == 0)
            assert "The correct answer" not in each.prompt.text

    def test_the_reference_answer_on_request(self, make_group, prompts):
        feedback = Critique(2, 2, options=CritiqueOptions(show_reference=True))
        drafts = make_group([0, 2])
        following = feedback.next_prompts(drafts, feedback.select(drafts, 1), prompts)
        assert all("The correct answer is 2." in each.prompt.text for each in following)

    @pytest.mark.parametrize(
        ("refined", "keep", "kept"),
        [([0, 0, 2, 2], 1, [2]), ([0, 0.5, 0, 0], 1, [1]), ([0] * 4, 2, [0, 1]),
         ([2, 0, 2, 0], 3, [0, 2, 1])],
    )  # fmt: skip
    def test_the_best_refinements_are_trained_under_q_with_the_answers(
        self, make_group, prompts, refined, keep, kept
    ):
        feedback = Critique(4, 4, options=CritiqueOptions(keep=keep))
        rollout = rollout_of(
            feedback, make_group([0, 2, 0, 2]), prompts, make_group, rewards=refined
        )
        rows = feedback.training_rows(rollout)
        answers, refinements = rows[:4], rows[4:]
        assert len(rows) == feedback.num_trained == 4 + keep
        assert {row.group for row in rows} == {answers[0].group}
        assert {row.context_ids for row in rows} == {(1, 2)}
        assert [row.reward for row in refinements] == [refined[i] for i in kept]
        expected = [rollout.refinements[i].completions[0] for i in kept]
        assert all(row.completion is c for row, c in zip(refinements, expected, strict=True))
        assert {row.weight for row in refinements} == {4 / keep}
        assert all(row.shaped for row in refinements)
        assert all(row.weight == 1 and not row.shaped for row in answers)

    def test_solved_problems_need_no_refinement_where_only_hopeless_ones_get_one(
        self, make_group, prompts
    ):
        feedback = Critique(4, 4, options=CritiqueOptions(refine="all_wrong"))
        for rewards, prompted in (([0, 1, 0, 0], 0), ([0] * 4, 4)):
            rollout = rollout_of(feedback, make_group(rewards), prompts, make_group)
            assert len(rollout.refinements) == prompted
            assert len(feedback.training_rows(rollout)) == 4 + bool(prompted)


def test_a_solved_problem_can_end_with_its_drafts(make_group, prompts):
    options = BestDraftOptions(skip_solved=True)
    feedback = BestDraft(3, 2, train_stages=tuple(Stage), options=options)
    solved = rollout_of(feedback, make_group([0, 2, 0]), prompts, make_group)
    assert solved.refinements == ()
    assert [row.stage for row in feedback.training_rows(solved)] == [Stage.DRAFT] * 3
    unsolved = rollout_of(feedback, make_group([0, 0, 0]), prompts, make_group)
    assert len(feedback.training_rows(unsolved)) == 3 + 2


@pytest.mark.parametrize("shapes", [False, True])
def test_refinements_can_be_trained_under_the_question(make_group, prompts, shapes):
    options = BestDraftOptions(train_under_question=True)
    feedback = BestDraft(2, 3, shapes=shapes, options=options)
    rollout = rollout_of(feedback, make_group([0, 2]), prompts, make_group)
    rows = feedback.training_rows(rollout)
    assert [row.context_ids for row in rows] == [rollout.drafts.prompt.token_ids] * 3
    assert rollout.refinements[0].prompt.token_ids != rollout.drafts.prompt.token_ids
    assert [row.shaped for row in rows] == [shapes] * 3


def test_an_exemplar_is_the_same_for_every_problem_and_replaces_the_draft(make_group, prompts):
    feedback = Exemplar(2, 3, options=ExemplarOptions(text="E: 1+2= <think>3</think>3"))
    shown = []
    for name, rewards in (("a", [0, 2]), ("b", [2, 0])):
        drafts = make_group(rewards, problem_id=name)
        rollout = rollout_of(feedback, drafts, prompts, make_group)
        (group,) = rollout.refinements
        (following,) = feedback.next_prompts(drafts, rollout.selection, prompts)
        text = following.prompt.text
        assert len(group.completions) == 3 and not (rollout.selection and rollout.selection.shown)
        assert "E: 1+2= <think>3</think>3" in text and "text 0" not in text
        rows = feedback.training_rows(rollout)
        assert len(rows) == feedback.num_trained == 3
        assert {row.context_ids for row in rows} == {group.prompt.token_ids}
        shown.append(text)
    assert shown[0] == shown[1]


def igrpo_of(name, **changed):
    """The part of the config section that a feedback reads."""
    stages = {"none": ["draft"], "best_draft": ["refine"], "exemplar": ["refine"]}
    values = {
        "feedback": name,
        "num_drafts": 4,
        "num_refinements": 4,
        "budget": 8,
        "train_stages": stages.get(name, ["draft", "refine"]),
        "draft_choice": "best",
        "tie_break": "first",
        "on_all_zero": "condition",
        "rank_truncated_last": True,
        "draft_dropout": 0.0,
        "shaping_gamma": 0.1,
        "feedback_options": {"text": "e"} if name == "exemplar" else {},
        **changed,
    }
    return SimpleNamespace(**values)


@pytest.mark.parametrize("name", FEEDBACKS)
def test_every_feedback_is_made_of_the_config_and_counts_its_rows(name):
    feedback = FEEDBACKS[name].of(igrpo_of(name), 3)
    assert not list(feedback.problems())
    assert feedback.num_trained >= 4 and isinstance(feedback.trains_drafts, bool)
    assert feedback.num_prompts == {"none": 0, "critique": 4}.get(name, 1)
    with pytest.raises(UserError, match=r"unknown key igrpo.feedback_options.no_such: feedback"):
        FEEDBACKS[name].of(igrpo_of(name, feedback_options={"no_such": 1}), 3)


def test_a_feedback_from_elsewhere_is_named_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "my_feedback.py").write_text(
        "from igrpo_nemo.feedback import BestDraft as Mine\nthing = 3\n"
    )
    (tmp_path / "broken_feedback.py").write_text("raise RuntimeError('broken\\nin two lines')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert feedback_class("my_feedback:Mine") is BestDraft
    for name, message in (
        ("my_feedback:Yours", "cannot be imported"),
        ("no_such_module:Mine", "cannot be imported (No module named"),
        ("broken_feedback:Mine", "cannot be imported (broken)"),
        ("my_feedback:thing", "is no feedback: it has no of, select"),
        ("mine", "should be 'none' or 'best_draft' or"),
    ):
        with pytest.raises(UserError) as error:
            feedback_class(name)
        assert message in str(error.value) and "\n" not in str(error.value)

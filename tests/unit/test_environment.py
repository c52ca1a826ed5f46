import pytest

from igrpo_nemo.environment import Attempt, TwoStageEnvironment
from igrpo_nemo.feedback import BestDraft, NoFeedback, SelfVerification
from igrpo_nemo.prompts import PromptBuilder, PromptProfile, TokenBudget
from igrpo_nemo.rewards import build_scorer
from igrpo_nemo.types import Completion, Problem, Stage, StopReason, Target

RIGHT = "<think>1+1 is 2</think><answer>2</answer>"
WRONG = "<think>1+1 is 3</think><answer>3</answer>"
UNFORMATTED = "<answer>2</answer>"


def attempt(environment, problem, texts):
    completions = tuple(Completion(t, (5, 6), (-1.0, -1.0), StopReason.EOS) for t in texts)
    return Attempt(problem, environment.reset(problem).prompt, completions)


@pytest.fixture
def environment(tokenizer):
    prompts = PromptBuilder(tokenizer, PromptProfile("S", "\n", "draft"), TokenBudget(600, 60))
    return TwoStageEnvironment(prompts, build_scorer(), BestDraft(3, 2))


def test_drafts_are_scored_selected_and_answered_with_q_refined(environment):
    problems = [Problem("a", "1+1=", "2"), Problem("b", "2-1=", "1")]
    results = environment.step(
        "draft",
        [
            attempt(environment, problems[0], [WRONG, UNFORMATTED, RIGHT]),
            attempt(environment, problems[1], [WRONG, WRONG, RIGHT]),
        ],
        step=1,
    )
    assert [r.group.problem.id for r in results] == ["a", "b"]
    assert results[0].group.rewards == (1.0, 1.0, 2.0)
    assert results[0].selection.index == 2
    assert "1+1 is 2" in results[0].observations[0].prompt.text
    assert results[0].observations[0].num_samples == 2
    assert not results[0].terminated
    assert results[1].group.rewards == (1.0, 1.0, 1.0) and results[1].selection.index == 0


def test_refinements_terminate_without_observation(environment):
    problem = Problem("a", "1+1=", "2")
    (result,) = environment.step(Stage.REFINE, [attempt(environment, problem, [RIGHT, WRONG])])
    assert result.terminated and not result.observations and result.selection is None
    assert result.group.stage is Stage.REFINE
    assert [s.correct for s in result.group.scores] == [True, False]


def test_plain_scoring_terminates_too(environment):
    (result,) = environment.step(None, [attempt(environment, Problem("a", "1+1=", "2"), [RIGHT])])
    assert result.terminated and result.group.rewards == (2.0,)


def test_without_feedback_the_draft_stage_ends_the_episode(environment):
    single = TwoStageEnvironment(environment.prompts, environment.scorer, NoFeedback(2))
    (result,) = single.step("draft", [attempt(single, Problem("a", "1+1=", "2"), [RIGHT, WRONG])])
    assert result.terminated and result.selection is None
    assert single.reset(Problem("a", "1+1=", "2")).num_samples == 2


def test_a_thinking_part_opened_by_the_template_earns_the_format_reward(tokenizer):
    import copy

    r1 = copy.deepcopy(tokenizer)
    r1.chat_template = tokenizer.chat_template.replace("assistant\\n'", "assistant\\n<think>\\n'")
    prompts = PromptBuilder(r1, PromptProfile("S", "\n", "draft"), TokenBudget(600, 60))
    environment = TwoStageEnvironment(prompts, build_scorer(), BestDraft(2, 2))
    problem = Problem("a", "1+1=", "2")
    (result,) = environment.step(
        None, [attempt(environment, problem, ["1+1 is 2</think><answer>2</answer>", "2"])]
    )
    assert result.group.rewards == (2.0, 0.0)


@pytest.mark.parametrize(
    ("target", "box"), [(None, "2"), (Target("yes", ("yes", "no"), 1.0), "\\text{yes}")]
)
def test_an_answer_that_may_go_on_behind_the_limit_counts_as_none(environment, target, box):
    problem = Problem("a", "1+1=", "2")

    def correct(reason):
        completion = Completion(f"it is \\boxed {box}", (5, 6), (-1.0, -1.0), reason)
        at = Attempt(problem, environment.reset(problem).prompt, (completion,), target)
        return environment.step(None, [at])[0].group.scores[0].correct

    assert (correct(StopReason.EOS), correct(StopReason.LENGTH)) == (True, False)


def test_attempts_at_a_target_are_scored_against_it_among_others(tokenizer):
    """As they come back from the engine, mixed with attempts at the problem's answer."""
    prompts = PromptBuilder(tokenizer, PromptProfile("S", "\n", "draft"), TokenBudget(900, 60))
    environment = TwoStageEnvironment(prompts, build_scorer(), SelfVerification(4, 3))
    problem = Problem("a", "1+1=", "2")
    (drafted,) = environment.step(
        "draft", [attempt(environment, problem, [RIGHT, WRONG, WRONG, WRONG])], step=1
    )
    (following,) = drafted.observations
    assert not drafted.terminated and following.num_samples == 3
    right = following.target.word == "yes"
    texts = ("<answer>Yes</answer>", "<answer>no</answer>", "<answer>2</answer>")
    verdicts = tuple(Completion(text, (5, 6), (-1.0, -1.0), StopReason.EOS) for text in texts)
    plain = attempt(environment, problem, [RIGHT])
    first, second, third = environment.step(
        "refine", [plain, Attempt.at(problem, following, verdicts), plain]
    )
    assert first.group.rewards == third.group.rewards == (2.0,) and first.group.target is None
    assert second.terminated and second.group.target == following.target
    assert second.group.rewards == ((1.5, 0.0, 0.0) if right else (0.0, 0.5, 0.0))
    assert [score.correct for score in second.group.scores] == [right, not right, False]

"""Stage 1 and Stage 2 as environment steps, free of any framework.

    step("draft", attempts)  -> scored group, selection, observations = the q' to sample from
    step("refine", attempts) -> scored group, terminated
    step(None, attempts)     -> scored group, terminated: plain scoring, as in validation

An engine samples and calls `step`; it knows neither the reward nor what Stage 2 shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from igrpo_nemo.feedback import Feedback, NextPrompt
from igrpo_nemo.prompts import PromptBuilder
from igrpo_nemo.rewards import Scorer, ScoreRequest
from igrpo_nemo.rewards.extract import target_score
from igrpo_nemo.types import Completion, Group, Problem, Prompt, Selection, Stage, Target


@dataclass(frozen=True, slots=True)
class Attempt:
    """The completions that an engine sampled from one prompt of one problem, to be scored against
    `target` or, without one, the problem's answer."""

    problem: Problem
    prompt: Prompt
    completions: tuple[Completion, ...]
    target: Target | None = None

    @classmethod
    def at(
        cls, problem: Problem, following: NextPrompt, completions: Sequence[Completion]
    ) -> Attempt:
        """At a prompt that the environment gave."""
        return cls(problem, following.prompt, tuple(completions), following.target)


@dataclass(frozen=True, slots=True)
class StepReturn:
    """The outcome of an attempt; `observations` are the next prompts, fresh conversations."""

    group: Group
    selection: Selection | None
    observations: tuple[NextPrompt, ...]
    terminated: bool


class TwoStageEnvironment:
    """Scores attempts and builds the second stage (paper section 3.2.2, Algorithm 1)."""

    def __init__(self, prompts: PromptBuilder, scorer: Scorer, feedback: Feedback) -> None:
        self.prompts = prompts
        self.scorer = scorer
        self.feedback = feedback

    def reset(self, problem: Problem) -> NextPrompt:
        """The first prompt q of a problem, and how many drafts to sample from it."""
        return NextPrompt(self.prompts.question(problem), self.feedback.num_drafts)

    def step(
        self, stage: Stage | str | None, attempts: Sequence[Attempt], *, step: int = 0
    ) -> list[StepReturn]:
        """Scores every attempt in one batch and, after drafts, returns the Stage 2 prompts.

        `step` numbers the training step (see `Feedback.select`). The order of `attempts` is kept.
        """
        groups = scored(self.scorer, Stage(stage or Stage.DRAFT), attempts)
        if stage != Stage.DRAFT:
            return [StepReturn(group, None, (), True) for group in groups]
        return [self.after_drafts(group, step) for group in groups]

    def after_drafts(self, drafts: Group, step: int) -> StepReturn:
        """The draft stage of a group whose scores are known: the selection and the next prompts."""
        selection = self.feedback.select(drafts, step)
        observations = self.feedback.next_prompts(drafts, selection, self.prompts)
        return StepReturn(drafts, selection, observations, not observations)


def scored(scorer: Scorer, stage: Stage, attempts: Sequence[Attempt]) -> list[Group]:
    """The group of each attempt, all scored in one batch."""
    asked = [
        ScoreRequest(a.problem, c.text, a.prompt.thinking_open, c.truncated)
        for a in attempts
        if a.target is None
        for c in a.completions
    ]
    scores = iter(scorer(asked))
    return [
        Group(
            a.problem,
            stage,
            a.prompt,
            a.completions,
            tuple(
                target_score(a.target, c.text, a.prompt.thinking_open, c.truncated)
                if a.target
                else next(scores)
                for c in a.completions
            ),
            a.target,
        )
        for a in attempts
    ]

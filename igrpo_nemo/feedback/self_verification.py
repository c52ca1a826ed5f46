"""Self-Verification (arXiv 2506.01369): the policy also learns to judge its own solutions.

    m solutions of q --one of them, right and wrong in turn--> (q, solution, "is it correct?")
                     --> G verdicts; a right "yes" earns 2 (1 - p), a right "no" 2 p, a wrong one 0

p is the share of right solutions, so that a verdict that is easily guessed earns little. Solutions
and verdicts are both trained, each under its own prompt and in its own group. Here verdicts are
about solutions of the same step (the publication also draws from a buffer of earlier ones).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from igrpo_nemo.feedback.protocol import (
    NextPrompt,
    Options,
    group_name,
    other_stages,
    read_options,
    rows_of_group,
    too_small,
)
from igrpo_nemo.prompts import PromptBuilder
from igrpo_nemo.types import Group, Rollout, Selection, Stage, Target, TrainingRow

VERDICTS = ("yes", "no")


class VerificationOptions(Options):
    """`igrpo.feedback_options` of `self_verification`: the texts around the solution."""

    intro: str = "\n\nA proposed solution:\n"
    """What stands between the problem and the solution."""
    question: str = (
        "\n\nVerify the proposed solution step by step. Is its answer correct? "
        "Answer with Yes or No: <answer>Yes</answer> or <answer>No</answer>."
    )
    """What stands behind the solution."""


@dataclass(frozen=True, slots=True)
class SelfVerification:
    """m = `num_drafts` solutions of q, G = `num_refinements` verdicts on one of them."""

    num_drafts: int
    num_refinements: int
    seed: int = 0
    train_stages: tuple[str, ...] = (Stage.DRAFT, Stage.REFINE)
    options: VerificationOptions = VerificationOptions()

    two_stage = True
    trains_drafts = True
    repeats_question = False

    @classmethod
    def of(cls, igrpo: Any, seed: int) -> Self:
        options = read_options(VerificationOptions, igrpo)
        stages = tuple(igrpo.train_stages)
        return cls(igrpo.num_drafts, igrpo.num_refinements, seed, stages, options)

    @property
    def num_trained(self) -> int:
        return self.num_drafts + self.num_refinements

    def problems(self) -> Iterator[str]:
        yield from other_stages("self_verification", self.train_stages, *Stage)
        yield from too_small("igrpo.num_drafts", self.num_drafts)
        yield from too_small("igrpo.num_refinements", self.num_refinements)

    def select(self, drafts: Group, step: int) -> Selection:
        """A right or a wrong solution, as a coin of (seed, step, problem) says, where there are
        both; any of them otherwise."""
        rng = random.Random(f"{self.seed}/{step}/{drafts.problem.id}/verify")
        wanted = rng.random() < 0.5
        candidates = [i for i, score in enumerate(drafts.scores) if score.correct == wanted]
        index = rng.choice(candidates or range(len(drafts.scores)))
        return Selection(index, "right" if drafts.scores[index].correct else "wrong")

    def next_prompts(
        self, drafts: Group, selection: Selection | None, prompts: PromptBuilder
    ) -> tuple[NextPrompt, ...]:
        """No prompt where the context has no room for the question: q would take its place."""
        assert selection is not None and selection.index is not None
        text = drafts.completions[selection.index].text
        prompt = prompts.showing(
            drafts.problem, text, intro=self.options.intro, remark=self.options.question
        )
        if prompt.token_ids == drafts.prompt.token_ids:
            return ()
        right = [score.correct for score in drafts.scores]
        share = sum(right) / len(right)
        if right[selection.index]:
            target = Target("yes", VERDICTS, 2 * (1 - share))
        else:
            target = Target("no", VERDICTS, 2 * share)
        return (NextPrompt(prompt, self.num_refinements, target),)

    def training_rows(self, rollout: Rollout) -> list[TrainingRow]:
        rows = rows_of_group(rollout.drafts, group_name(rollout.problem.id, Stage.DRAFT))
        for group in rollout.refinements:
            rows += rows_of_group(group, group_name(rollout.problem.id, Stage.REFINE))
        return rows

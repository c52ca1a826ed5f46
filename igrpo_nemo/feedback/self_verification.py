"""Self-Verification (arXiv 2506.01369): the policy also learns to judge its own solutions.

    m solutions of q --one of them, right and wrong in turn--> (q, solution, "is it correct?")
                     --> G verdicts; a right "yes" earns 2 (1 - p), a right "no" 2 p, a wrong one 0

p is the share of right solutions, so that a verdict that is easily guessed earns little. Solutions
and verdicts are both trained, each under its own prompt and in its own group. With a buffer, as in
the publication, a verdict may be about any solution of earlier steps, of whatever problem.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import Field

from igrpo_nemo.feedback.protocol import (
    NextPrompt,
    Options,
    group_name,
    other_stages,
    read_options,
    rows_of_group,
    too_small,
)
from igrpo_nemo.feedback.solution_buffer import Solution, SolutionBuffer
from igrpo_nemo.prompts import PromptBuilder
from igrpo_nemo.types import Group, Rollout, Selection, Stage, Target, TrainingRow

VERDICTS = ("yes", "no")


class VerificationOptions(Options):
    """`igrpo.feedback_options` of `self_verification`."""

    intro: str = "\n\nA proposed solution:\n"
    """What stands between the problem and the solution."""
    question: str = (
        "\n\nVerify the proposed solution step by step. Is its answer correct? "
        "Answer with Yes or No: <answer>Yes</answer> or <answer>No</answer>."
    )
    """What stands behind the solution."""
    buffer_age: Annotated[int, Field(ge=0)] = 0
    """Steps for which a solution may be asked about; 0 is its own step alone."""
    buffer_size: Annotated[int, Field(ge=1)] = 5000
    """Solutions of earlier steps that are kept, the newest."""


@dataclass(frozen=True, slots=True)
class SelfVerification:
    """m = `num_drafts` solutions of q, G = `num_refinements` verdicts on one of them, or on one
    that `memory` holds."""

    num_drafts: int
    num_refinements: int
    seed: int = 0
    train_stages: tuple[str, ...] = (Stage.DRAFT, Stage.REFINE)
    options: VerificationOptions = VerificationOptions()
    memory: SolutionBuffer | None = None

    two_stage = True
    num_prompts = 1
    trains_drafts = True
    repeats_question = False

    @classmethod
    def of(cls, igrpo: Any, seed: int) -> Self:
        options = read_options(VerificationOptions, igrpo)
        stages, age = tuple(igrpo.train_stages), options.buffer_age
        memory = SolutionBuffer(age, options.buffer_size) if age else None
        return cls(igrpo.num_drafts, igrpo.num_refinements, seed, stages, options, memory)

    @property
    def num_trained(self) -> int:
        return self.num_drafts + self.num_refinements

    def problems(self) -> Iterator[str]:
        yield from other_stages("self_verification", self.train_stages, *Stage)
        yield from too_small("igrpo.num_drafts", self.num_drafts)
        yield from too_small("igrpo.num_refinements", self.num_refinements)

    def select(self, drafts: Group, step: int) -> Selection:
        """A right or a wrong solution, as a coin of (seed, step, problem) says, where there are
        both; any of the drafts otherwise."""
        rng = random.Random(f"{self.seed}/{step}/{drafts.problem.id}/verify")
        wanted = rng.random() < 0.5
        own = len(drafts.scores)
        right = [score.correct for score in drafts.scores]
        right += [solution.right for solution in self._earlier]
        index = rng.choice([i for i, each in enumerate(right) if each == wanted] or range(own))
        rule = "right" if right[index] else "wrong"
        if index < own:
            return Selection(index, rule)
        return Selection(None, rule, remembered=index - own)

    @property
    def _earlier(self) -> Sequence[Solution]:
        return self.memory.solutions if self.memory else ()

    def next_prompts(
        self, drafts: Group, selection: Selection | None, prompts: PromptBuilder
    ) -> tuple[NextPrompt, ...]:
        """No prompt where the context has no room for the question: q would take its place."""
        assert selection is not None
        if selection.remembered is not None:
            shown = self._earlier[selection.remembered]
        else:
            assert selection.index is not None
            text, score = drafts.completions[selection.index].text, drafts.scores[selection.index]
            shown = Solution(0, drafts.problem, text, score.correct, drafts.share_right)
        prompt = prompts.showing(
            shown.problem, shown.text, intro=self.options.intro, remark=self.options.question
        )
        if prompt.token_ids == prompts.question(shown.problem).token_ids:
            return ()
        if shown.right:
            target = Target("yes", VERDICTS, 2 * (1 - shown.share))
        else:
            target = Target("no", VERDICTS, 2 * shown.share)
        return (NextPrompt(prompt, self.num_refinements, target),)

    def training_rows(self, rollout: Rollout) -> list[TrainingRow]:
        rows = rows_of_group(rollout.drafts, group_name(rollout.problem.id, Stage.DRAFT))
        for group in rollout.refinements:
            rows += rows_of_group(group, group_name(rollout.problem.id, Stage.REFINE))
        return rows

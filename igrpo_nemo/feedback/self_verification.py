"""Self-Verification (arXiv 2506.01369): the policy also learns to judge its own solutions.

    m solutions of q --one of them, right and wrong in turn--> (q, solution, "is it correct?")
                     --> G verdicts; a right "yes" earns 2 (1 - p), a right "no" 2 p, a wrong one 0

p is the share of right solutions, so that a verdict that is easily guessed earns little. Solutions
and verdicts are both trained, each under its own prompt and in its own group. With a buffer, as in
the publication, a verdict may be about any solution of earlier steps, of whatever problem.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Self

from pydantic import Field

from igrpo_nemo.feedback.protocol import Feedback, NextPrompt, Options
from igrpo_nemo.prompts import PromptBuilder
from igrpo_nemo.types import Group, Problem, Rollout, Selection, Stage, Target

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
class Solution:
    """A solution as its step left it; `share` of its group was right."""

    step: int
    problem: Problem
    text: str
    right: bool
    share: float


class SolutionBuffer:
    """A `Memory`: the solutions of step s are there in the steps s + 1 to s + `age`, the newest
    `size` of them."""

    off = "igrpo.feedback_options.buffer_age=0"

    def __init__(self, age: int, size: int) -> None:
        self.age, self.size = age, size
        self.solutions: list[Solution] = []

    def add(self, rollouts: Sequence[Rollout], step: int) -> None:
        kept = [solution for solution in self.solutions if solution.step > step - self.age]
        for drafts in (rollout.drafts for rollout in rollouts):
            kept += [
                Solution(step, drafts.problem, completion.text, score.correct, drafts.share_right)
                for completion, score in zip(drafts.completions, drafts.scores, strict=True)
            ]
        self.solutions = kept[-self.size :]

    def state_dict(self) -> dict[str, Any]:
        return {"solutions": [asdict(solution) for solution in self.solutions]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.solutions = [
            Solution(**{**each, "problem": Problem(**each["problem"])})
            for each in state["solutions"]
        ]


@dataclass(frozen=True)
class SelfVerification(Feedback):
    """m = `num_drafts` solutions of q, G = `num_refinements` verdicts on one of them, or on one
    that `memory` holds."""

    memory: SolutionBuffer | None = None

    Options = VerificationOptions
    trained = (Stage.DRAFT, Stage.REFINE)

    @classmethod
    def of(cls, igrpo: Any, seed: int) -> Self:
        plain = super().of(igrpo, seed)
        age, size = plain.options.buffer_age, plain.options.buffer_size
        return replace(plain, memory=SolutionBuffer(age, size) if age else None)

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

"""Critique-GRPO (arXiv 2506.03106): answers are criticised, refined, and learned from together.

    n answers of q --rule-based critique of each--> n prompts (q, answer, critique)
                   --> one refinement each, the best k kept
                   --> one group of n + k rows, all trained under q

A refinement was sampled under its critique and is trained under q, where the policy may find it
improbable: the objective shapes it, p / (p + `igrpo.shaping_gamma`). The loss is the mean over the
answers plus the mean over the refinements, so a refinement weighs n / k beside an answer's 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from igrpo_nemo.feedback.protocol import (
    Feedback,
    NextPrompt,
    Options,
    group_name,
    rows_of_group,
)
from igrpo_nemo.prompts import PromptBuilder
from igrpo_nemo.types import Group, Rollout, Selection, Stage, TrainingRow


class CritiqueOptions(Options):
    """`igrpo.feedback_options` of `critique`."""

    keep: Annotated[int, Field(ge=1)] = 1
    """Refinements that are trained (k), right ones first."""
    refine: Literal["always", "all_wrong"] = "always"
    """Refines every answer, or those of problems that no answer solved."""
    show_reference: bool = False
    """The critique names the reference answer."""
    intro: str = "\n\nA previous attempt:\n"
    """What stands between the problem and the answer."""
    right: str = "\n\nCritique: the attempt's final answer is correct."
    """The critique of a right answer."""
    wrong: str = "\n\nCritique: the attempt's final answer is incorrect."
    """The critique of a wrong answer."""
    reference: str = " The correct answer is {answer}."
    """Stands behind the critique with `show_reference`; `{answer}` is the reference answer."""
    request: str = "\n\nSolve the problem again, using the critique."
    """What is asked then."""


@dataclass(frozen=True)
class Critique(Feedback):
    """n = `num_drafts` answers, as many refinements, `options.keep` of them trained.

    `shapes`: `igrpo.shaping_gamma` is set; without it refinements have the ratio of Eq. 5, as if
    the policy had sampled them under q.
    """

    shapes: bool = True

    Options = CritiqueOptions
    trained = (Stage.DRAFT, Stage.REFINE)

    @classmethod
    def of(cls, igrpo: Any, seed: int) -> Self:
        return replace(super().of(igrpo, seed), shapes=igrpo.shaping_gamma is not None)

    @property
    def num_prompts(self) -> int:  # type: ignore[override]
        return self.num_drafts

    @property
    def num_trained(self) -> int:
        return self.num_drafts + self.options.keep

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.num_refinements != self.num_drafts:
            yield (
                f"igrpo.num_refinements={self.num_refinements}, but feedback critique refines each "
                f"draft once: set igrpo.num_refinements={self.num_drafts}"
            )
        if self.options.keep > self.num_drafts:
            yield (
                f"igrpo.feedback_options.keep={self.options.keep} of {self.num_drafts} refinements:"
                f" set it to at most {self.num_drafts}"
            )

    def select(self, drafts: Group, step: int) -> Selection:
        """Every answer, or none where one is right and only hopeless problems are refined."""
        solved = any(score.correct for score in drafts.scores)
        if solved and self.options.refine == "all_wrong":
            return Selection(None, "none")
        return Selection(None, "each", each=tuple(range(len(drafts.scores))))

    def next_prompts(
        self, drafts: Group, selection: Selection | None, prompts: PromptBuilder
    ) -> tuple[NextPrompt, ...]:
        assert selection is not None
        shown = (
            prompts.showing(
                drafts.problem,
                drafts.completions[i].text,
                intro=self.options.intro,
                remark=self._remark(drafts.scores[i].correct, drafts.problem.answer),
            )
            for i in selection.each
        )
        return tuple(NextPrompt(prompt, 1) for prompt in shown)

    def _remark(self, right: bool, answer: str) -> str:
        critique = self.options.right if right else self.options.wrong
        if self.options.show_reference:
            critique += self.options.reference.replace("{answer}", answer)
        return critique + self.options.request

    def training_rows(self, rollout: Rollout) -> list[TrainingRow]:
        name = group_name(rollout.problem.id, Stage.DRAFT)
        answers = rows_of_group(rollout.drafts, name)
        refined = [
            (not score.correct, -score.reward, row)
            for group in rollout.refinements
            for score, row in zip(group.scores, rows_of_group(group, name), strict=True)
        ]
        refined.sort(key=lambda each: each[:2])  # stable: the first of equals is kept
        kept = [row for *_, row in refined[: self.options.keep]]
        return answers + [
            replace(
                row,
                context_ids=rollout.drafts.prompt.token_ids,
                weight=len(answers) / len(kept),
                shaped=self.shapes,
            )
            for row in kept
        ]

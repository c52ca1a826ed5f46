"""The paper's other conditioning: a static exemplar in the prompt (J_ICL, section 3.2.1).

    q' = Concat(q, e), the same e for every problem and every step --> G completions, trained

It differs from the best draft in one thing, what the prompt shows: "static" against "dynamic". The
N drafts are sampled and scored as there, so that both runs see as many completions, and not used.
"""

from __future__ import annotations

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
from igrpo_nemo.types import Group, Rollout, Selection, Stage, TrainingRow


class ExemplarOptions(Options):
    """`igrpo.feedback_options` of `exemplar`."""

    text: str = ""
    """The exemplar e: another problem and its solution."""
    intro: str = "\n\nA worked example of another problem:\n"
    """What stands between the problem and the exemplar."""


@dataclass(frozen=True, slots=True)
class Exemplar:
    """G = `num_refinements` completions of (q, e); N = `num_drafts` of q that are not shown."""

    num_drafts: int
    num_refinements: int
    train_stages: tuple[str, ...] = (Stage.REFINE,)
    options: ExemplarOptions = ExemplarOptions()

    two_stage = True
    num_prompts = 1
    trains_drafts = False
    repeats_question = False

    @classmethod
    def of(cls, igrpo: Any, seed: int) -> Self:
        options = read_options(ExemplarOptions, igrpo)
        return cls(igrpo.num_drafts, igrpo.num_refinements, tuple(igrpo.train_stages), options)

    @property
    def num_trained(self) -> int:
        return self.num_refinements

    def problems(self) -> Iterator[str]:
        yield from other_stages("exemplar", self.train_stages, Stage.REFINE)
        if not self.options.text.strip():
            yield "igrpo.feedback_options.text is missing: feedback exemplar shows that text"
        yield from too_small("igrpo.num_refinements", self.num_refinements)

    def select(self, drafts: Group, step: int) -> Selection:
        return Selection(None, "exemplar")

    def next_prompts(
        self, drafts: Group, selection: Selection | None, prompts: PromptBuilder
    ) -> tuple[NextPrompt, ...]:
        options = self.options
        prompt = prompts.showing(drafts.problem, options.text, intro=options.intro, content="full")
        return (NextPrompt(prompt, self.num_refinements),)

    def training_rows(self, rollout: Rollout) -> list[TrainingRow]:
        name = group_name(rollout.problem.id, Stage.REFINE)
        return [row for group in rollout.refinements for row in rows_of_group(group, name)]

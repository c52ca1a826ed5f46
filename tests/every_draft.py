"""A feedback that the project does not know, as a user writes one; it is named by its path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from igrpo_nemo.feedback import NextPrompt
from igrpo_nemo.feedback.protocol import group_name, rows_of_group, too_small
from igrpo_nemo.types import Selection, Stage

PATH = "every_draft:EveryDraft"
"""The value of `igrpo.feedback`, with this folder on the path."""


@dataclass(frozen=True, slots=True)
class EveryDraft:
    """Shows every second draft to two refinements, which are a group."""

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
    def num_prompts(self) -> int:
        return self.num_drafts // 2

    @property
    def num_trained(self) -> int:
        return self.num_drafts

    def problems(self) -> Iterator[str]:
        yield from too_small("igrpo.num_drafts", self.num_drafts)

    def select(self, drafts, step):
        return Selection(index=None, rule="every")

    def next_prompts(self, drafts, selection, prompts):
        shown = (prompts.refinement(drafts.problem, d.text) for d in drafts.completions[::2])
        return tuple(NextPrompt(prompt, 2) for prompt in shown)

    def training_rows(self, rollout):
        return [
            row
            for i, group in enumerate(rollout.refinements)
            for row in rows_of_group(group, group_name(rollout.problem.id, Stage.REFINE, i))
        ]

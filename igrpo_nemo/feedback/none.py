"""No feedback: plain GRPO. One stage, the whole budget under q, every completion trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from igrpo_nemo.feedback.protocol import (
    NextPrompt,
    Options,
    group_name,
    read_options,
    rows_of_group,
    too_small,
)
from igrpo_nemo.prompts import PromptBuilder
from igrpo_nemo.types import Group, Rollout, Selection, Stage, TrainingRow


@dataclass(frozen=True, slots=True)
class NoFeedback:
    """GRPO's single stage (paper section 3.1) with `budget` completions per problem."""

    budget: int
    train_stages: tuple[str, ...] = (Stage.DRAFT,)
    two_stage = False
    num_refinements = 0
    num_prompts = 0
    trains_drafts = True
    repeats_question = False

    @classmethod
    def of(cls, igrpo: Any, seed: int) -> Self:
        read_options(Options, igrpo)
        return cls(igrpo.budget, tuple(igrpo.train_stages))

    @property
    def num_drafts(self) -> int:
        return self.budget

    @property
    def num_trained(self) -> int:
        return self.budget

    def problems(self) -> Iterator[str]:
        if self.train_stages != (Stage.DRAFT,):
            yield (
                f"igrpo.train_stages=[{', '.join(self.train_stages)}], but feedback none has only "
                "the stage draft: use the group feedback=none, which sets [draft]"
            )
        yield from too_small("igrpo.budget", self.budget)

    def select(self, drafts: Group, step: int) -> Selection | None:
        return None

    def next_prompts(
        self, drafts: Group, selection: Selection | None, prompts: PromptBuilder
    ) -> tuple[NextPrompt, ...]:
        return ()

    def training_rows(self, rollout: Rollout) -> list[TrainingRow]:
        return rows_of_group(rollout.drafts, group_name(rollout.problem.id, Stage.DRAFT))

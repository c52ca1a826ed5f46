"""No feedback: plain GRPO. One stage, the whole budget under q, every completion trained."""

from __future__ import annotations

from dataclasses import dataclass

from igrpo_nemo.feedback.protocol import NextPrompt, group_name, rows_of_group
from igrpo_nemo.prompts import PromptBuilder
from igrpo_nemo.types import Group, Rollout, Selection, Stage, TrainingRow


@dataclass(frozen=True, slots=True)
class NoFeedback:
    """GRPO's single stage (paper section 3.1) with `budget` completions per problem."""

    budget: int

    @property
    def num_drafts(self) -> int:
        return self.budget

    @property
    def num_trained(self) -> int:
        return self.budget

    def select(self, drafts: Group, step: int) -> Selection | None:
        return None

    def next_prompts(
        self, drafts: Group, selection: Selection | None, prompts: PromptBuilder
    ) -> tuple[NextPrompt, ...]:
        return ()

    def training_rows(self, rollout: Rollout) -> list[TrainingRow]:
        return rows_of_group(rollout.drafts, group_name(rollout.problem.id, Stage.DRAFT))

"""iGRPO's self-feedback: the draft with the highest reward is appended to the prompt.

    N drafts of q --select (Eq. 2)--> one draft --q' (Eq. 3)--> G refinements, which are trained

The options beside the paper's setting are controls (another choice of draft) and answers to
questions the paper leaves open (ties, all drafts wrong, training both stages).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

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
class BestDraft:
    """Best-draft feedback (paper section 3.2.2); the defaults are the paper's.

    `draft_choice`: `best` is Eq. 2; `random`, `worst` and `none` are controls.
    `tie_break`: equal drafts, the first one or one drawn with the seed.
    `on_all_zero`: no draft earned anything: `condition` on the tie-break's winner all the same
    (the literal arg max), `skip` the problem's Stage 2, or refine with `no_draft`.
    `rank_truncated_last`: at equal reward a finished draft beats a truncated one.
    `draft_dropout`: the share of Stage 2 prompts that show no draft.
    `train_stages`: `refine` alone is the paper; with `draft` the drafts are trained too, under q
    and in their own group.
    """

    num_drafts: int
    num_refinements: int
    seed: int = 0
    draft_choice: Literal["best", "random", "worst", "none"] = "best"
    tie_break: Literal["first", "random"] = "first"
    on_all_zero: Literal["condition", "skip", "no_draft"] = "condition"
    rank_truncated_last: bool = True
    draft_dropout: float = 0.0
    train_stages: tuple[Stage, ...] = (Stage.REFINE,)

    two_stage = True
    num_prompts = 1

    @classmethod
    def of(cls, igrpo: Any, seed: int) -> Self:
        read_options(Options, igrpo)
        return cls(
            num_drafts=igrpo.num_drafts,
            num_refinements=igrpo.num_refinements,
            seed=seed,
            draft_choice=igrpo.draft_choice,
            tie_break=igrpo.tie_break,
            on_all_zero=igrpo.on_all_zero,
            rank_truncated_last=igrpo.rank_truncated_last,
            draft_dropout=igrpo.draft_dropout,
            train_stages=tuple(Stage(stage) for stage in igrpo.train_stages),
        )

    @property
    def trains_drafts(self) -> bool:
        return Stage.DRAFT in self.train_stages

    @property
    def repeats_question(self) -> bool:
        bare = self.draft_choice == "none" or self.on_all_zero == "no_draft"
        return bare or self.draft_dropout > 0

    @property
    def num_trained(self) -> int:
        drafts = self.num_drafts if self.trains_drafts else 0
        return drafts + (self.num_refinements if Stage.REFINE in self.train_stages else 0)

    def problems(self) -> Iterator[str]:
        stages = ", ".join(self.train_stages)
        if Stage.REFINE not in self.train_stages:
            yield (
                f"igrpo.train_stages=[{stages}] leaves out refine, which igrpo.feedback=best_draft "
                "is for: use [refine], [draft, refine], or feedback=none"
            )
        if len(set(self.train_stages)) < len(self.train_stages):
            yield f"igrpo.train_stages=[{stages}] names a stage twice"
        yield from too_small("igrpo.num_refinements", self.num_refinements)
        if self.trains_drafts and self.num_drafts < 2:
            yield (
                f"igrpo.num_drafts={self.num_drafts} with trained drafts: a group needs at least "
                "2 rows: with one its advantage is always 0"
            )

    def select(self, drafts: Group, step: int) -> Selection:
        rng = random.Random(f"{self.seed}/{step}/{drafts.problem.id}/select")
        all_zero = max(drafts.rewards) <= 0
        if self.draft_choice == "none" or rng.random() < self.draft_dropout:
            return Selection(index=None, rule="none")
        if all_zero and self.on_all_zero != "condition":
            skipped = self.on_all_zero == "skip"
            return Selection(index=None, rule=self.on_all_zero, skipped=skipped)
        if self.draft_choice == "random":
            return Selection(index=rng.randrange(len(drafts.scores)), rule="random")
        ranks = [self._rank(drafts, i) for i in range(len(drafts.scores))]
        wanted = max(ranks) if self.draft_choice == "best" else min(ranks)
        tied = [i for i, rank in enumerate(ranks) if rank == wanted]
        index = tied[0] if self.tie_break == "first" else rng.choice(tied)
        return Selection(index=index, rule=self.draft_choice)

    def _rank(self, drafts: Group, index: int) -> tuple[float, bool]:
        finished = not (self.rank_truncated_last and drafts.completions[index].truncated)
        return drafts.scores[index].reward, finished

    def next_prompts(
        self, drafts: Group, selection: Selection | None, prompts: PromptBuilder
    ) -> tuple[NextPrompt, ...]:
        if selection is None or selection.skipped:
            return ()
        if selection.index is None:
            prompt = drafts.prompt
        else:
            prompt = prompts.refinement(drafts.problem, drafts.completions[selection.index].text)
        return (NextPrompt(prompt, self.num_refinements),)

    def training_rows(self, rollout: Rollout) -> list[TrainingRow]:
        rows: list[TrainingRow] = []
        if rollout.selection is not None and rollout.selection.skipped:
            return rows
        if self.trains_drafts:
            rows += rows_of_group(rollout.drafts, group_name(rollout.problem.id, Stage.DRAFT))
        if Stage.REFINE in self.train_stages:
            for i, group in enumerate(rollout.refinements):
                rows += rows_of_group(group, group_name(rollout.problem.id, Stage.REFINE, i))
        return rows

"""iGRPO's self-feedback: the draft with the highest reward is appended to the prompt.

    N drafts of q --select (Eq. 2)--> one draft --q' (Eq. 3)--> G refinements, which are trained

The options beside the paper's setting are controls (another choice of draft) and answers to
questions the paper leaves open (ties, all drafts wrong, training both stages).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from igrpo_nemo.feedback.protocol import Feedback, NextPrompt, Options, too_small
from igrpo_nemo.prompts import PromptBuilder
from igrpo_nemo.types import Group, Rollout, Selection, Stage, TrainingRow

SOLVED = "solved"
"""The rule of a selection that ends a problem's rollout with its drafts."""


class BestDraftOptions(Options):
    """`igrpo.feedback_options` of `best_draft`, all off in the paper's setting."""

    skip_solved: bool = False
    """No Stage 2 for a problem that a draft solves: its drafts alone are trained, where they are
    (`igrpo.train_stages`)."""
    train_under_question: bool = False
    """Refinements are trained under q, from which they are answered at inference, and not under
    q'; with `igrpo.shaping_gamma` they are shaped, as in `critique`."""


@dataclass(frozen=True)
class BestDraft(Feedback):
    """Best-draft feedback (paper section 3.2.2); the defaults are the paper's.

    The fields are `igrpo.*` keys (config/igrpo_keys.py). `draft_choice`: `best` is Eq. 2, the
    others are controls. `on_all_zero`: no draft earned anything: `condition` on the tie-break's
    winner all the same (the literal arg max), `skip` the problem's Stage 2, or refine with
    `no_draft`. `train_stages` with `draft`: the drafts are trained too, under q, as a group.
    """

    draft_choice: Literal["best", "random", "worst", "none"] = "best"
    tie_break: Literal["first", "random"] = "first"
    on_all_zero: Literal["condition", "skip", "no_draft"] = "condition"
    rank_truncated_last: bool = True
    draft_dropout: float = 0.0
    shapes: bool = False

    Options = BestDraftOptions

    @classmethod
    def of(cls, igrpo: Any, seed: int) -> Self:
        return replace(
            super().of(igrpo, seed),
            draft_choice=igrpo.draft_choice,
            tie_break=igrpo.tie_break,
            on_all_zero=igrpo.on_all_zero,
            rank_truncated_last=igrpo.rank_truncated_last,
            draft_dropout=igrpo.draft_dropout,
            shapes=igrpo.shaping_gamma is not None,
        )

    @property
    def trained(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.train_stages or (Stage.REFINE,)

    @property
    def repeats_question(self) -> bool:  # type: ignore[override]
        bare = self.draft_choice == "none" or self.on_all_zero == "no_draft"
        return bare or self.draft_dropout > 0

    def problems(self) -> Iterator[str]:
        stages = ", ".join(self.trained)
        if Stage.REFINE not in self.trained:
            yield (
                f"igrpo.train_stages=[{stages}] leaves out refine, which igrpo.feedback=best_draft "
                "is for: use [refine], [draft, refine], or feedback=none"
            )
        if len(set(self.trained)) < len(self.trained):
            yield f"igrpo.train_stages=[{stages}] names a stage twice"
        yield from too_small("igrpo.num_refinements", self.num_refinements)
        if self.trains_drafts:
            yield from too_small("igrpo.num_drafts", self.num_drafts)

    def select(self, drafts: Group, step: int) -> Selection:
        rng = random.Random(f"{self.seed}/{step}/{drafts.problem.id}/select")
        all_zero = max(drafts.rewards) <= 0
        if self.options.skip_solved and any(score.correct for score in drafts.scores):
            return Selection(index=None, rule=SOLVED)
        if self.draft_choice == "none" or rng.random() < self.draft_dropout:
            return Selection(index=None, rule="none")
        if all_zero and self.on_all_zero != "condition":
            skipped = self.on_all_zero == "skip"
            return Selection(index=None, rule=self.on_all_zero, skipped=skipped)
        if self.draft_choice == "random":
            return Selection(index=rng.randrange(len(drafts.scores)), rule="random")
        # At equal reward a finished draft beats a truncated one.
        ranks = [
            (score.reward, not (self.rank_truncated_last and completion.truncated))
            for score, completion in zip(drafts.scores, drafts.completions, strict=True)
        ]
        wanted = max(ranks) if self.draft_choice == "best" else min(ranks)
        tied = [i for i, rank in enumerate(ranks) if rank == wanted]
        index = tied[0] if self.tie_break == "first" else rng.choice(tied)
        return Selection(index=index, rule=self.draft_choice)

    def next_prompts(
        self, drafts: Group, selection: Selection | None, prompts: PromptBuilder
    ) -> tuple[NextPrompt, ...]:
        if selection is None or selection.skipped or selection.rule == SOLVED:
            return ()
        if selection.index is None:
            prompt = drafts.prompt
        else:
            prompt = prompts.refinement(drafts.problem, drafts.completions[selection.index].text)
        return (NextPrompt(prompt, self.num_refinements),)

    def training_rows(self, rollout: Rollout) -> list[TrainingRow]:
        if rollout.selection is not None and rollout.selection.skipped:
            return []
        rows = super().training_rows(rollout)
        if not self.options.train_under_question:
            return rows
        q = rollout.drafts.prompt.token_ids
        return [
            replace(row, context_ids=q, shaped=self.shapes) if row.stage is Stage.REFINE else row
            for row in rows
        ]

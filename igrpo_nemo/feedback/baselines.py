"""What the paper compares the best draft with: no feedback, and a static exemplar."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from igrpo_nemo.feedback.protocol import Feedback, NextPrompt, Options, read_options, too_small
from igrpo_nemo.prompts import PromptBuilder
from igrpo_nemo.types import Group, Selection, Stage


@dataclass(frozen=True)
class NoFeedback(Feedback):
    """GRPO's single stage (paper section 3.1): the whole budget, `num_drafts`, under q."""

    num_refinements: int = 0
    trained = (Stage.DRAFT,)
    two_stage = False
    num_prompts = 0

    @classmethod
    def of(cls, igrpo: Any, seed: int) -> Self:
        read_options(Options, igrpo)
        return cls(igrpo.budget, train_stages=tuple(igrpo.train_stages))

    def problems(self) -> Iterator[str]:
        if self.train_stages != (Stage.DRAFT,):
            yield (
                f"igrpo.train_stages=[{', '.join(self.train_stages or ())}], but feedback none has "
                "only the stage draft: use the group feedback=none, which sets [draft]"
            )
        yield from too_small("igrpo.budget", self.num_drafts)

    def select(self, drafts: Group, step: int) -> Selection | None:
        return None

    def next_prompts(
        self, drafts: Group, selection: Selection | None, prompts: PromptBuilder
    ) -> tuple[NextPrompt, ...]:
        return ()


class ExemplarOptions(Options):
    """`igrpo.feedback_options` of `exemplar`."""

    text: str = ""
    """The exemplar e: another problem and its solution."""
    intro: str = "\n\nA worked example of another problem:\n"
    """What stands between the problem and the exemplar."""


@dataclass(frozen=True)
class Exemplar(Feedback):
    """J_ICL (section 3.2.1): q' = Concat(q, e), the same e for every problem and every step.

    It differs from the best draft in one thing, what the prompt shows: "static" against "dynamic".
    The N drafts are sampled and scored as there, so that both runs see as many completions, and
    not used.
    """

    Options = ExemplarOptions

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not self.options.text.strip():
            yield "igrpo.feedback_options.text is missing: feedback exemplar shows that text"

    def select(self, drafts: Group, step: int) -> Selection:
        return Selection(None, "exemplar")

    def next_prompts(
        self, drafts: Group, selection: Selection | None, prompts: PromptBuilder
    ) -> tuple[NextPrompt, ...]:
        text, intro = self.options.text, self.options.intro
        prompt = prompts.showing(drafts.problem, text, intro=intro, content="full")
        return (NextPrompt(prompt, self.num_refinements),)

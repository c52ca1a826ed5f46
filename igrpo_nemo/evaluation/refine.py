"""Refined answers: of the first N bare answers to a problem one is chosen, and q' shows it.

    OUT/eval-results/<bench>/          bare answers; output-rs{0..N-1} are the drafts
    OUT/refined/eval-results/<bench>/  answers to q' = Concat(q, chosen draft), in the same layout

Both engines of evaluation choose here. A draft's text is data wherever it is shown.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.results import sample_path
from igrpo_nemo.prompts import PromptBuilder
from igrpo_nemo.types import Problem, Prompt

Choice = Literal["reward", "majority"]


@dataclass(frozen=True, slots=True)
class Refinement:
    """`drafts` (N) bare answers of each problem are looked at, one is chosen by `choose`.

    `reward` takes the best as training does: it looks at the gold. `majority` takes the first
    draft that gives the most frequent answer, which can be done where there is no gold.
    """

    drafts: int
    choose: Choice = "reward"

    @classmethod
    def of(cls, drafts: int | None, choose: Choice) -> Refinement | None:
        """What the flags `--refine` and `--choose` ask for; None for bare answers alone."""
        return None if drafts is None else cls(drafts, choose)

    def check(self, samples: int, benchmark: str) -> None:
        """Raises `UserError` where there are fewer bare answers than drafts."""
        if samples < self.drafts:
            raise UserError(
                f"--refine {self.drafts} chooses among the first {self.drafts} bare answers, "
                f"{benchmark} has {samples} a problem: sample as many"
            )

    def chosen(self, folder: Path) -> list[str]:
        """The draft of each problem, in the data's order, from a benchmark's finished samples."""
        files = [sample_path(folder, seed) for seed in range(self.drafts)]
        columns = [
            [json.loads(line) for line in file.read_bytes().split(b"\n") if line] for file in files
        ]
        return [
            whole_reply(rows[chosen_draft(rows, self.choose)])
            for rows in zip(*columns, strict=True)
        ]


def whole_reply(row: Mapping[str, Any]) -> str:
    """What the model wrote: NeMo-Skills' client takes a leading thinking part off."""
    thinking = row.get("reasoning_content")
    return (
        row["generation"] if thinking is None else f"<think>{thinking}</think>{row['generation']}"
    )


def chosen_draft(drafts: Sequence[Mapping[str, Any]], choose: Choice) -> int:
    """Which of a problem's drafts q' shows, the first one of equals; rows of sample files.

    Rows of NeMo-Skills have no reward: their verdict takes its place. At equal reward a finished
    draft beats one that was cut off.
    """
    votes = Counter(row["predicted_answer"] for row in drafts)
    votes[None] = 0

    def rank(index: int) -> tuple[float, bool]:
        row = drafts[index]
        finished = row.get("finish_reason") != "length"
        if choose == "majority":
            return votes[row["predicted_answer"]], finished
        return float(row.get("reward", row["symbolic_correct"])), finished

    return max(range(len(drafts)), key=rank)


@dataclass(frozen=True, slots=True)
class RefiningPrompts:
    """q' in the place of q: the draft of each problem id is shown as training's Stage 2 does."""

    prompts: PromptBuilder
    drafts: Mapping[str, str]

    def question(self, problem: Problem) -> Prompt:
        return self.prompts.refinement(problem, self.drafts[problem.id])

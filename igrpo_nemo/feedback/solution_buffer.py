"""Solutions of earlier steps, which Self-Verification may ask about (arXiv 2506.01369).

finished step --add--> the newest `size` solutions, none older than `age` steps --> a verdict each
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from igrpo_nemo.types import Problem, Rollout


@dataclass(frozen=True, slots=True)
class Solution:
    """A solution as its step left it; `share` of its group was right."""

    step: int
    problem: Problem
    text: str
    right: bool
    share: float


class SolutionBuffer:
    """A `Memory`: the solutions of step s are there in the steps s + 1 to s + `age`."""

    off = "igrpo.feedback_options.buffer_age=0"

    def __init__(self, age: int, size: int) -> None:
        self.age = age
        self.size = size
        self.solutions: list[Solution] = []

    def add(self, rollouts: Sequence[Rollout], step: int) -> None:
        kept = [solution for solution in self.solutions if solution.step > step - self.age]
        for rollout in rollouts:
            drafts = rollout.drafts
            share = drafts.share_right
            kept += [
                Solution(step, drafts.problem, completion.text, score.correct, share)
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

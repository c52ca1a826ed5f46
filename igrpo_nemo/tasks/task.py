"""What a generated task is: exercises with one right answer, and a demonstrator who errs.

    sample -> exercise --right / attempt / correct--> WorkedAnswer -> text, with its format now and
                                                                  then broken

A model that imitates the demonstrator starts at a middling success rate, which reinforcement can
raise. Under a draft the demonstrator keeps what is right, mends what is wrong, and does neither
reliably.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Exercise(Protocol):
    """A problem as a task knows it."""

    @property
    def question(self) -> str: ...

    @property
    def answer(self) -> str: ...


@dataclass(frozen=True, slots=True)
class WorkedAnswer:
    """Reasoning step by step, and the answer that it leads to; None where it was cut off."""

    steps: tuple[str, ...]
    answer: str | None

    @property
    def text(self) -> str:
        """The format that the prompt asks for: reasoning in `<think>`, the result in `<answer>`."""
        reasoning = "<think>" + "".join(self.steps)
        if self.answer is None:
            return reasoning
        return f"{reasoning}</think><answer>{self.answer}</answer>"


@dataclass(frozen=True)
class Task:
    """A source of exercises with its demonstrator, whose errors have rates.

    The fields are those rates, and part of a warmed-up model's identity; `right_draft_share` of the
    drafts to correct are right. The methods take exercises of the task's own kind.
    """

    seed: int = 0
    right_draft_share: float = 0.3

    def sample(self, rng: random.Random, size: int) -> Any:
        """An `Exercise`; `size` sets how hard it is."""
        raise NotImplementedError

    def right(self, exercise: Any) -> WorkedAnswer:
        """The solution without an error."""
        raise NotImplementedError

    def attempt(self, exercise: Any, rng: random.Random) -> WorkedAnswer:
        """What the demonstrator makes of the bare exercise."""
        raise NotImplementedError

    def draft(self, exercise: Any, rng: random.Random) -> WorkedAnswer:
        """A draft to correct."""
        right = rng.random() < self.right_draft_share
        return self.right(exercise) if right else self.attempt(exercise, rng)

    def correct(self, exercise: Any, draft: WorkedAnswer, rng: random.Random) -> WorkedAnswer:
        """What the demonstrator makes of the exercise under a draft."""
        raise NotImplementedError


def verdict(
    task: Task, exercise: Exercise, draft: WorkedAnswer, words: Sequence[str], rng: random.Random
) -> WorkedAnswer:
    """A judgement of a draft's answer after an own attempt: the first of the two words where the
    answers agree, the other one where they do not."""
    own = task.attempt(exercise, rng)
    return WorkedAnswer(own.steps, words[own.answer != draft.answer])


def written(solution: WorkedAnswer, rng: random.Random, broken_format: float) -> str:
    """A solution's text; a share `broken_format` of them lacks a tag."""
    if rng.random() >= broken_format:
        return solution.text
    tag = rng.choice(("<think>", "</think>", "<answer>", "</answer>"))
    return solution.text.replace(tag, "")


def is_validation(question: str) -> bool:
    """Whether a question is held out; about one in five is."""
    return random.Random(question).random() < 0.2

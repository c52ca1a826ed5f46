"""Generated tasks by name: small enough to learn on a laptop, hard enough to fail at."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from igrpo_nemo.tasks.chain import ChainTask, LongChainTask
from igrpo_nemo.tasks.sudoku import SudokuTask
from igrpo_nemo.tasks.task import Task, is_validation
from igrpo_nemo.types import Problem

TASKS: Mapping[str, type[Task]] = {
    "arithmetic": ChainTask,
    "long_chain": LongChainTask,
    "sudoku": SudokuTask,
}
"""By `data.train.dataset_name`."""


def generated_problems(
    name: str, count: int, *, lengths: Sequence[int], seed: int, split: str
) -> list[Problem]:
    """`count` different problems; `split` keeps training and validation problems apart.

    A problem belongs to the validation split when the digest of its question says so, hence the
    splits are disjoint whatever their sizes and seeds. Raises ValueError where `lengths` allow too
    few different ones.
    """
    task, rng = TASKS[name](), random.Random(f"{seed}/{split}")
    problems: dict[str, Problem] = {}
    for _ in range(50 * count + 1000):
        if len(problems) == count:
            return list(problems.values())
        exercise = task.sample(rng, rng.choice(list(lengths)))
        question = exercise.question
        if is_validation(question) == (split == "validation"):
            problems[question] = Problem(f"{split}-{question}", question, exercise.answer)
    raise ValueError(f"{name} of length {list(lengths)} gives fewer than {count} problems")

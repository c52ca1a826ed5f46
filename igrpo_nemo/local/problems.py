"""The problems of a run: generated arithmetic, or a data set's rows."""

from __future__ import annotations

from igrpo_nemo.config import Config
from igrpo_nemo.config.nemo_keys import Dataset
from igrpo_nemo.data.arithmetic import arithmetic_problems
from igrpo_nemo.errors import UserError
from igrpo_nemo.prompts import PromptBuilder
from igrpo_nemo.types import Problem


def training_problems(config: Config) -> list[Problem]:
    """`data.train`. Raises `UserError` where it has no usable problem."""
    return _load(config.data.train, config.grpo.seed, "train")


def validation_problems(config: Config) -> list[Problem]:
    """`data.validation`, at most `grpo.max_val_samples` of it; empty where there is none."""
    if config.data.validation is None:
        return []
    problems = _load(config.data.validation, config.grpo.seed, "validation")
    return problems[: config.grpo.max_val_samples]


def fitting_problems(
    problems: list[Problem], prompts: PromptBuilder, *, drop_overlong: bool
) -> list[Problem]:
    """The problems whose q fits; one that does not is left out or, by default, an error."""
    fitting = []
    for problem in problems:
        try:
            prompts.question(problem)
        except UserError:
            if not drop_overlong:
                raise
        else:
            fitting.append(problem)
    return fitting


def _load(dataset: Dataset, seed: int, split: str) -> list[Problem]:
    if dataset.dataset_name == "arithmetic":
        count, lengths = dataset.num_problems or 0, dataset.lengths or []
        return arithmetic_problems(
            count, lengths=lengths, seed=seed if dataset.seed is None else dataset.seed, split=split
        )
    from igrpo_nemo.data import load_problems

    return load_problems(dataset)

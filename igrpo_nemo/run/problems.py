"""The problems of a run, generated or a data set's rows; how many, before they are loaded."""

from __future__ import annotations

import random
import warnings

from igrpo_nemo.config import Config
from igrpo_nemo.config.nemo_keys import Dataset
from igrpo_nemo.data.catalog import find_source
from igrpo_nemo.data.order import mixed
from igrpo_nemo.errors import UserError
from igrpo_nemo.prompts import OverlongError, PromptBuilder
from igrpo_nemo.tasks import TASKS, generated_problems
from igrpo_nemo.types import Problem


def training_problems(config: Config) -> list[Problem]:
    """`data.train` without what is held out. Raises `UserError` where it has no usable problem."""
    return _held_out(config)[0]


def validation_problems(config: Config) -> list[Problem]:
    """`data.validation`, or the share of the training problems that is held out in its place.

    At most `grpo.max_val_samples`; empty where there is neither.
    """
    if config.data.validation is None:
        problems = _held_out(config)[1]
    else:
        problems = _load(config, config.data.validation, "validation")
    return problems[: config.grpo.max_val_samples]


def _held_out(config: Config) -> tuple[list[Problem], list[Problem]]:
    """The training problems and, where there is no validation set, a seeded share of them."""
    kept: list[list[Problem]] = []
    apart: list[Problem] = []
    sets = config.data.train_sets
    for train in sets:
        problems = _load(config, train, "train")
        if count := held_out(config, train, len(problems)):
            seed = config.grpo.seed if train.seed is None else train.seed
            random.Random(f"{seed}/held out").shuffle(problems)
        apart += problems[:count]
        kept.append(problems[count:])
    if config.data.only_set:
        return kept[0], apart
    weights = [train.weight for train in sets if train.weight]
    return mixed(kept, weights or None, seed=config.grpo.seed), apart


def expected_problems(config: Config) -> int | None:
    """Training problems as far as the config alone tells: generated ones, a subset's size, or what
    is known of a named set. None where only loading the data tells.

    Questions that are too long are counted: how many there are depends on the tokenizer.
    """
    counts = [expected_of(config, train) for train in config.data.train_sets]
    return None if None in counts else sum(filter(None, counts))


def expected_of(config: Config, train: Dataset) -> int | None:
    """`expected_problems` of one of the sets."""
    count = train.num_problems
    if count is None:
        source = None if train.data_path else find_source(train.dataset_name)
        if source is None or train.drop_duplicates or train.drop_overlap:
            return None
        count = source.usable.get(train.split or source.default_split)
    return None if count is None else count - held_out(config, train, count)


def held_out(config: Config, train: Dataset, count: int) -> int:
    """How many of a set's problems are held out, where there is no validation set."""
    if config.data.validation is not None or not train.split_validation_size:
        return 0
    return max(1, round(train.split_validation_size * count))


def fitting_problems(
    problems: list[Problem], prompts: PromptBuilder, *, drop_overlong: bool
) -> list[Problem]:
    """The problems whose q fits; one that does not is left out, with a warning, or by default an
    error."""
    fitting, limit = [], 0
    for problem in problems:
        try:
            prompts.question(problem)
        except OverlongError as error:
            if not drop_overlong:
                raise
            limit = error.limit
        else:
            fitting.append(problem)
    if left_out := len(problems) - len(fitting):
        told = (
            f"{left_out:,} of {len(problems):,} problems are left out: their prompts have more "
            f"than {limit:,} tokens (igrpo.drop_overlong_prompts)"
        )
        if not fitting:
            raise UserError(
                f"{told}; raise policy.max_total_sequence_length or data.max_input_seq_length"
            )
        warnings.warn(told, stacklevel=2)
    return fitting


def _load(config: Config, dataset: Dataset, split: str) -> list[Problem]:
    if dataset.dataset_name in TASKS:
        count, lengths = dataset.num_problems or 0, dataset.lengths or []
        seed = config.grpo.seed if dataset.seed is None else dataset.seed
        name = dataset.dataset_name
        return generated_problems(name, count, lengths=lengths, seed=seed, split=split)
    from igrpo_nemo.data import load_with_report

    problems, report = load_with_report(dataset, columns=bool(config.igrpo.reward.functions))
    if report.loss:
        warnings.warn(report.loss, stacklevel=2)
    return problems

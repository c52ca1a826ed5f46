"""How many problems a run will train on, before its data is loaded."""

from __future__ import annotations

from igrpo_nemo.config import Config
from igrpo_nemo.data.catalog import default_split, find_source


def expected_problems(config: Config) -> int | None:
    """Training problems as far as the config alone tells: generated ones, a subset's size, or what
    is known of a named set. None where only loading the data tells.

    Questions that are too long are counted: how many there are depends on the tokenizer.
    """
    train = config.data.train
    count = train.num_problems
    if count is None:
        source = None if train.data_path else find_source(train.dataset_name)
        filtered = train.drop_duplicates or train.drop_overlap
        if source is None or filtered:
            return None
        count = source.usable.get(train.split or default_split(source))
    if count is None or config.data.validation is not None or not train.split_validation_size:
        return count
    return count - max(1, round(train.split_validation_size * count))

"""Published figures of the paper's experiments, as printed there: `configs/paper_results.yaml`.

experiment: {benchmark: percent, ..., published_average, recomputed_average, source}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from igrpo_nemo.config.compose import builtin_config_dir
from igrpo_nemo.errors import UserError

FILE = "paper_results.yaml"


@dataclass(frozen=True, slots=True)
class Published:
    """A row of the paper: accuracies (fractions) by benchmark, and where they stand.

    `average` is the printed one, `recomputed` the mean of the printed columns: they need not agree.
    """

    experiment: str
    benchmarks: Mapping[str, float]
    average: float | None
    recomputed: float | None
    source: str


def published_results(experiment: str, file: Path | None = None) -> Published:
    """The published row of an experiment. Raises `UserError` for one that has none."""
    path = file or builtin_config_dir() / FILE
    rows = _rows(path)
    if experiment not in rows:
        known = ", ".join(rows) or "none"
        raise UserError(f"{path.name} has no published figures of {experiment}: it has {known}")
    figures = dict(rows[experiment])
    source = figures.pop("source", "")
    # Beside percentages a row may hold a note, a gain by benchmark, a cost.
    numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
    fractions = {name: value / 100 for name, value in numbers.items()}
    average = fractions.pop("published_average", None)
    recomputed = fractions.pop("recomputed_average", None)
    return Published(experiment, fractions, average, recomputed, source)


def find_published(experiment: str | None) -> Published | None:
    """The published row of an experiment, None where there is none."""
    if experiment is None or experiment not in _rows(builtin_config_dir() / FILE):
        return None
    return published_results(experiment)


@lru_cache
def _rows(path: Path) -> dict[str, dict[str, Any]]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))

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
    # Beside percentages a row may hold a note, a gain by benchmark, a cost.
    numbers = {k: v / 100 for k, v in rows[experiment].items() if isinstance(v, int | float)}
    average, recomputed = (numbers.pop(f"{n}_average", None) for n in ("published", "recomputed"))
    source = rows[experiment].get("source", "")
    return Published(experiment, numbers, average, recomputed, source)


def is_published(experiment: str | None) -> bool:
    return experiment in _rows(builtin_config_dir() / FILE)


@lru_cache
def _rows(path: Path) -> dict[str, dict[str, Any]]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))

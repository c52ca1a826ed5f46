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
    path = file or _default_file()
    rows = _rows(path)
    if experiment not in rows:
        known = ", ".join(rows) or "none"
        raise UserError(f"{path.name} has no published figures of {experiment}: it has {known}")
    row = rows[experiment]
    own = {"published_average", "recomputed_average", "source"}
    return Published(
        experiment,
        {name: float(value) / 100 for name, value in row.items() if _is_figure(name, value, own)},
        _fraction(row.get("published_average")),
        _fraction(row.get("recomputed_average")),
        str(row.get("source", "")),
    )


def find_published(experiment: str | None) -> Published | None:
    """The published row of an experiment, None where there is none."""
    if experiment is None or experiment not in _rows(_default_file()):
        return None
    return published_results(experiment)


def _default_file() -> Path:
    from igrpo_nemo.config.compose import builtin_config_dir

    return builtin_config_dir() / FILE


def _is_figure(name: str, value: Any, own: set[str]) -> bool:
    return name not in own and isinstance(value, int | float)


def _fraction(value: Any) -> float | None:
    return float(value) / 100 if isinstance(value, int | float) else None


@lru_cache
def _rows(path: Path) -> Mapping[str, Mapping[str, Any]]:
    if not path.is_file():
        return {}
    rows = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return {str(name): row for name, row in rows.items() if isinstance(row, dict)}

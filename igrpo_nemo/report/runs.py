"""Reading run folders: the files a training run leaves behind, as frozen data.

    metrics.jsonl -> train, val: {name: Curve}    samples.jsonl -> samples
    config.yaml   -> config, config_text          summary.json  -> summary

A run that is still going, or that died mid-write, is readable: a torn last line is left out, and of
a step logged twice (a resumed run) the later one counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from igrpo_nemo.config.section import at
from igrpo_nemo.errors import UserError
from igrpo_nemo.run.folder import CONFIG, stored_config


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric over training: equally long steps (ascending) and finite values."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.steps)

    def tail_mean(self, share: float = 0.1) -> float | None:
        """Mean over the last `share` of the points (at least one); None for an empty curve."""
        if not self.values:
            return None
        count = max(1, round(len(self.values) * share))
        return sum(self.values[-count:]) / count


@dataclass(frozen=True, slots=True)
class Run:
    """One run folder. `label` names its group: runs with an equal label are seeds of one arm.

    `non_finite` are the (step, metric) whose values were inf or nan: they are in no curve.
    """

    path: Path
    name: str
    label: str
    train: Mapping[str, Curve]
    val: Mapping[str, Curve]
    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    samples: Sequence[Mapping[str, Any]] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    non_finite: tuple[tuple[int, str], ...] = ()

    def setting(self, dotted: str) -> Any:
        """A config value by its dotted name, None where absent."""
        return at(self.config, dotted)

    def accuracy(self, when: Literal["start", "end"]) -> float | None:
        """Held-out accuracy (a fraction) from the summary, or while there is none the curve's."""
        value = self.summary.get(f"val_accuracy_{when}")
        if isinstance(value, int | float):
            return float(value)
        curve = self.val.get("val/accuracy", Curve())
        return curve.values[0 if when == "start" else -1] if curve else None

    def tail(self, metric: str) -> float | None:
        """Mean of a training metric over the last tenth of its steps; None where not logged."""
        return self.train.get(metric, Curve()).tail_mean()

    @property
    def steps(self) -> int:
        """Number of the last logged training step."""
        return max((curve.steps[-1] for curve in self.train.values() if curve), default=0)


def load_run(folder: Path | str, name: str | None = None, label: str | None = None) -> Run:
    """Read a run folder. Raises `UserError` naming the folder or file that cannot be used."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give run folders, such as runs/demo")
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(
            f"{folder} has no metrics.jsonl: give a folder that `igrpo train` has written"
        )
    train, val, non_finite = _curves(path)
    if not train and not val:
        raise UserError(f"{path} holds no metrics yet: wait for the first step")
    config, summary = folder / CONFIG, folder / "summary.json"
    name = name or folder.resolve().name
    try:
        found = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}
    except json.JSONDecodeError as error:
        raise UserError(f"{summary} is not JSON ({error})") from None
    return Run(
        path=folder,
        name=name,
        label=label or name,
        train=train,
        val=val,
        config=stored_config(folder),
        config_text=config.read_text(encoding="utf-8") if config.is_file() else "",
        samples=tuple(row for _, row in _rows(folder / "samples.jsonl")),
        summary=found,
        non_finite=non_finite,
    )


def load_runs(folders: Sequence[Path | str], labels: Sequence[str] | None = None) -> list[Run]:
    """Read run folders; their names tell them apart (with parents where needed)."""
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise UserError("no run folder given: name at least one, such as runs/demo")
    if labels is not None and len(labels) != len(paths):
        raise UserError(f"{len(paths)} run folders but {len(labels)} labels: give one label a run")
    names = _distinct_names(paths)
    return [load_run(*each) for each in zip(paths, names, labels or names, strict=True)]


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("the same run folder is given twice: name each one once")


def _curves(path: Path) -> tuple[dict[str, Curve], dict[str, Curve], tuple[tuple[int, str], ...]]:
    points: dict[str, dict[str, dict[int, float]]] = {"train": {}, "val": {}}
    non_finite: list[tuple[int, str]] = []
    for number, row in _rows(path):
        try:
            metrics, step, kind = row["metrics"].items(), int(row["step"]), row["kind"]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(
                f"{path}:{number} is not a line of metrics (kind, step, metrics)"
            ) from None
        for name, value in metrics:
            if isinstance(value, int | float) and math.isfinite(value):
                points.setdefault(kind, {}).setdefault(name, {})[step] = float(value)
        non_finite += [(step, name) for name in row.get("non_finite", ())]
    train, val = (
        {n: Curve(tuple(sorted(p)), tuple(p[s] for s in sorted(p))) for n, p in found.items()}
        for found in (points["train"], points["val"])
    )
    return train, val, tuple(non_finite)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, object) of a JSON-lines file; nothing when it is absent."""
    if not path.is_file():
        return
    # Only "\n" ends a row: model text may hold other line separators.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                return  # no newline after it: a write that was cut off
            raise UserError(f"{path}:{number} is not JSON") from None

"""What a study found, as text, as JSON and as one HTML page with the curves.

finished runs --outcome--> tables and sentences -> study.json, TASK.html, the terminal
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from igrpo_nemo.evaluation.statistics import CONFIDENCE
from igrpo_nemo.evaluation.tables import Table, aligned
from igrpo_nemo.files.atomic import write_or_refuse
from igrpo_nemo.report.page import build_report
from igrpo_nemo.report.runs import Run, load_run
from igrpo_nemo.study.grid import Cell, Study
from igrpo_nemo.study.outcome import (
    ArmResult,
    Runs,
    arm_results,
    corrected,
    findings,
    result_table,
    verdict,
)

NOTE = (
    "Held-out problems, one answer each to the bare prompt q. Mean ± standard deviation over "
    "seeds; in brackets the t-interval of the difference paired by seed, which holds with 95 % for "
    "all arms of a table together (Bonferroni). Under a draft: the accuracy with a draft of the "
    "model's own shown, at the start and at the end. First gains: of the first validation after "
    "the start over the start, on q and under a draft. Completions sampled and trained are per "
    "seed. Entropy, verbatim copies of the draft and teaching groups (rewards not all equal) are "
    "means of the last tenth of training."
)


@dataclass(frozen=True, slots=True)
class StudyOutcome:
    """What the finished runs of a study say. `results` are by task."""

    study: Study
    runs: Mapping[str, Runs]
    results: Mapping[str, list[ArmResult]]
    cpu_hours: float

    @property
    def labels(self) -> dict[str, str]:
        return {name: arm.label for name, arm in self.study.arms.items()}

    def tables(self) -> list[Table]:
        """The claims, then a table a task."""
        by_task = [
            result_table(f"Held-out accuracy: {task}", results, self.labels, self.study.reference)
            for task, results in self.results.items()
        ]
        return [self.claims(), *by_task] if self.study.claims else by_task

    def claims(self) -> Table:
        """What is seen of each claim, with the interval; a column a task."""
        confidence = corrected(CONFIDENCE, len(self.study.claims))
        rows = tuple(
            (
                claim.says,
                claim.source,
                *(": ".join(verdict(claim, runs, confidence)) for runs in self.runs.values()),
            )
            for claim in self.study.claims
        )
        return Table("The claims", ("claim", "source", *self.runs), rows)

    def sentences(self) -> list[str]:
        """What the intervals allow to say of each arm."""
        said = []
        for task, results in self.results.items():
            of_task = findings(results, self.labels, self.study.reference)
            prefix = f"{task}: " if len(self.results) > 1 else ""
            said += [prefix + sentence for sentence in of_task]
        return said

    def to_dict(self) -> dict[str, Any]:
        claims = self.claims()
        return {
            "title": self.study.title,
            "reference": self.study.reference,
            "cpu_hours": round(self.cpu_hours, 2),
            "arms": {task: [asdict(r) for r in results] for task, results in self.results.items()},
            "claims": [dict(zip(claims.header, row, strict=True)) for row in claims.rows],
            "findings": self.sentences(),
        }


def outcome(study: Study, cells: Sequence[Cell], cpu_s: float) -> StudyOutcome:
    """Reads the runs of `cells` that are finished."""
    runs: dict[str, dict[str, dict[int, Run]]] = {task: {} for task in study.tasks}
    for cell in cells:
        if cell.is_finished:
            label = study.arms[cell.arm].label
            run = load_run(cell.folder, name=f"{cell.task}/{cell.arm}/{cell.seed}", label=label)
            runs[cell.task].setdefault(cell.arm, {})[cell.seed] = run
    runs = {task: by_arm for task, by_arm in runs.items() if by_arm}
    results = {task: arm_results(by_arm, study.reference) for task, by_arm in runs.items()}
    return StudyOutcome(study, runs, results, cpu_s / 3600)


def write(found: StudyOutcome, folder: Path) -> list[Path]:
    """`study.json` and a page of tables and curves for every task; returns the pages."""
    write_or_refuse(folder / "study.json", json.dumps(found.to_dict(), indent=1))
    pages = []
    for task, by_arm in found.runs.items():
        runs = [run for by_seed in by_arm.values() for run in by_seed.values()]
        page = build_report(
            [run.path for run in runs],
            folder / f"{task}.html",
            labels=[run.label for run in runs],
            title=f"{found.study.title}: {task}",
            introduction=f"{found.study.about} {NOTE}",
            tables=found.tables(),
        )
        pages.append(page)
    return pages


def text(found: StudyOutcome, pages: Sequence[Path]) -> str:
    """For the terminal: tables, note, sentences, where the pages are."""
    tables = ["\n".join([table.caption, "", *aligned(table)]) for table in found.tables()]
    sentences = "\n".join(f"- {sentence}" for sentence in found.sentences())
    cost = f"{found.cpu_hours:.1f} CPU-hours"
    return "\n\n".join([*tables, textwrap.fill(NOTE, 100), sentences, cost, *map(str, pages)])

"""What a study found, as text, as JSON and as one HTML page with the curves.

finished runs --outcome--> tables and sentences -> study.json, report.html, the terminal
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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

Table = tuple[str, list[str], list[list[str]]]
"""Caption, header and rows."""

NOTE = (
    "Held-out problems, one answer each to the bare prompt q. Mean ± standard deviation over "
    "seeds; in brackets the t-interval of the difference paired by seed, which holds with 95 % for "
    "all arms of a table together (Bonferroni). q' - q is the accuracy under the draft less the "
    "one without, at the end. Completions sampled and trained are per seed. Entropy, verbatim "
    "copies of the draft and teaching groups (rewards not all equal) are means of the last tenth "
    "of training."
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
        found: list[Table] = []
        if self.study.claims:
            found.append(("The claims, task by task", *self._claims()))
        for task, results in self.results.items():
            header, rows = result_table(results, self.labels, self.study.reference)
            found.append((f"Held-out accuracy by arm: {task}", header, rows))
        return found

    def sentences(self) -> list[str]:
        """What the intervals allow to say of each arm."""
        said = []
        for task, results in self.results.items():
            of_task = findings(results, self.labels, self.study.reference)
            prefix = f"{task}: " if len(self.results) > 1 else ""
            said += [prefix + sentence for sentence in of_task]
        return said

    def _claims(self) -> tuple[list[str], list[list[str]]]:
        claims = self.study.claims
        confidence = corrected(0.95, len(claims))
        rows = []
        for claim in claims:
            cells = [": ".join(verdict(claim, self.runs[t], confidence)) for t in self.results]
            rows.append([claim.says, claim.source, *cells])
        return ["claim", "source", *self.results], rows

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.study.title,
            "reference": self.study.reference,
            "cpu_hours": round(self.cpu_hours, 2),
            "arms": {task: [asdict(r) for r in results] for task, results in self.results.items()},
            "claims": [dict(zip(self._claims()[0], row, strict=True)) for row in self._claims()[1]],
            "findings": self.sentences(),
        }


def outcome(study: Study, cells: Sequence[Cell], cpu_s: float) -> StudyOutcome:
    """Reads the runs of `cells` that are finished."""
    runs: dict[str, dict[str, dict[int, Run]]] = {task: {} for task in study.tasks}
    for cell in cells:
        if (cell.folder / "summary.json").is_file():
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
        by_seed = [(arm, run) for arm, seeds in by_arm.items() for run in seeds.values()]
        pages.append(
            build_report(
                [run.path for _, run in by_seed],
                folder / f"{task}.html",
                labels=[run.label for _, run in by_seed],
                title=f"{found.study.title}: {task}",
                introduction=f"{found.study.about} {NOTE}",
                tables=found.tables(),
            )
        )
    return pages


def text(found: StudyOutcome, pages: Sequence[Path]) -> str:
    """For the terminal: tables, note, sentences, where the pages are."""
    tables = [
        f"{caption}\n\n{text_table(header, rows)}" for caption, header, rows in found.tables()
    ]
    sentences = "\n".join(f"- {sentence}" for sentence in found.sentences())
    cost = f"{found.cpu_hours:.1f} CPU-hours"
    return "\n\n".join([*tables, textwrap.fill(NOTE, 100), sentences, cost, *map(str, pages)])


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first one left, the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (cell.rjust(w) for cell, w in zip(cells, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *others])

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])

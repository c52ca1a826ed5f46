"""The comparison stage: evaluated systems and published figures as Markdown, CSV and HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from igrpo_nemo.chain.experiment import Experiment
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.published import Published, find_published, published_results
from igrpo_nemo.evaluation.systems import Comparison, System, compared, load_systems
from igrpo_nemo.evaluation.tables import (
    Table,
    accuracy_table,
    as_csv,
    as_markdown,
    difference_table,
    findings,
    settings_table,
)
from igrpo_nemo.files.atomic import write_or_refuse
from igrpo_nemo.report.page import render, write_page

NAMES = ("comparison.md", "comparison.csv", "report.html")


@dataclass(frozen=True, slots=True)
class Request:
    """What to compare. `systems`: `[LABEL=]FOLDER`, the first one being the reference.
    `experiments`: `[LABEL=]NAME` of published rows; without a label, the last system's."""

    systems: Sequence[str]
    experiments: Sequence[str] = ()
    anyway: bool = False
    confidence: float = 0.95
    seed: int = 0


def compare(request: Request, out: Path) -> Comparison:
    """Compares and writes `NAMES` into `out`. Raises `UserError` for what cannot be compared."""
    systems = load_systems(request.systems)
    comparison = compared(
        systems,
        anyway=request.anyway,
        published=_published(request.experiments, systems),
        confidence=request.confidence,
        seed=request.seed,
    )
    title = "Evaluation of " + ", ".join(system.label for system in systems)
    write_or_refuse(out / NAMES[0], as_markdown(comparison, title))
    write_or_refuse(out / NAMES[1], as_csv(comparison))
    write_page(out / NAMES[2], render([], title=title, evaluation=comparison))
    return comparison


def request_of(chain: Experiment, folder: Path) -> Request:
    """A chain's own evaluation in `folder` as the last system, beside its published figures."""
    published = [f"{chain.label}={chain.name}"] if find_published(chain.name) else []
    return Request([*chain.against, f"{chain.label}={folder}"], published, chain.anyway)


def compare_chain(chain: Experiment, folder: Path) -> str:
    """Compares a chain's own evaluation in `folder` with the others; what a terminal shows."""
    return summary_text(compare(request_of(chain, folder), chain.comparison), chain.comparison)


def summary_text(comparison: Comparison, out: Path) -> str:
    """What a terminal shows: the headline tables, the findings and where the rest is."""
    shown = [accuracy_table(comparison)]
    if comparison.differences:
        shown.append(difference_table(comparison))
    if comparison.differing:
        shown.append(settings_table(comparison))
    blocks = [f"{text_table(table)}\n{table.caption}" for table in shown]
    files = "\n".join(str(out / name) for name in NAMES)
    return "\n\n".join([*blocks, *(f"- {line}" for line in findings(comparison)), files])


def text_table(table: Table) -> str:
    """Columns as wide as their widest cell; the first one left, the others right."""
    rows = [table.header, *table.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (cell.rjust(w) for cell, w in zip(cells, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *others])

    return "\n".join([line(table.header), "  ".join("-" * w for w in widths), *map(line, rows[1:])])


def _published(names: Sequence[str], systems: Sequence[System]) -> dict[str, Published]:
    labels = [system.label for system in systems]
    found = {}
    for name in names:
        label, equals, experiment = name.partition("=")
        if not equals:
            label, experiment = labels[-1], name
        if label not in labels:
            raise UserError(f"--experiment {name}: {label} is none of {', '.join(labels)}")
        found[label] = published_results(experiment)
    return found

"""The comparison stage: evaluated systems and published figures as Markdown, CSV and HTML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from igrpo_nemo.chain.experiment import Experiment
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.results import REFINED
from igrpo_nemo.evaluation.systems import (
    Published,
    System,
    compared,
    is_published,
    load_systems,
    published_results,
)
from igrpo_nemo.evaluation.tables import as_csv, as_markdown, summary
from igrpo_nemo.files.atomic import write_or_refuse
from igrpo_nemo.report.page import render, write_page

NAMES = ("comparison.md", "comparison.csv", "report.html")


def compare(
    names: Sequence[str], out: Path, *, experiments: Sequence[str] = (), anyway: bool = False
) -> str:
    """Compares, writes `NAMES` into `out`, and returns what a terminal shows.

    `names`: `[LABEL=]FOLDER`, the first one being the reference; `experiments`: `[LABEL=]NAME` of
    published rows, without a label beside the last system. Raises `UserError` for what cannot be
    compared.
    """
    systems = load_systems(names)
    comparison = compared(systems, anyway=anyway, published=_published(experiments, systems))
    title = "Evaluation of " + ", ".join(system.label for system in systems)
    write_or_refuse(out / NAMES[0], as_markdown(comparison, title))
    write_or_refuse(out / NAMES[1], as_csv(comparison))
    write_page(out / NAMES[2], render([], title=title, evaluation=comparison))
    return "\n".join([summary(comparison), "", *(str(out / name) for name in NAMES)])


def compare_chain(chain: Experiment, folder: Path) -> str:
    """Compares a chain's own evaluation in `folder` with the others; what a terminal shows."""
    systems, experiments = compared_names(chain, folder / REFINED if chain.refine else folder)
    return compare(systems, chain.comparison, experiments=experiments, anyway=chain.anyway)


def compared_names(chain: Experiment, folder: Path) -> tuple[list[str], list[str]]:
    """The systems of a chain's comparison, its own evaluation in `folder` being the last one, and
    its published figures. Refined answers stand behind their bare ones."""
    published = [f"{chain.label}={chain.name}"] if is_published(chain.name) else []
    own = [f"{chain.label}={folder}"]
    if folder.name == REFINED:
        own = [f"{chain.label}={folder.parent}", f"{chain.label} {REFINED}={folder}"]
    return [*chain.against, *own], published


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

"""Assembling the page: run folders in, one HTML file without external requests out.

    load_runs    -> draw_figures, tables                         -> page.html.j2 -> report.html
    load_systems -> compared -> evaluation tables, pass@k figure ->

All text from runs is data: the template escapes everything but the SVG made here, and the page's
content policy allows no script but its own (by hash) and no network at all.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from igrpo_nemo.evaluation.systems import Comparison, compared, is_evaluation, load_systems
from igrpo_nemo.evaluation.tables import Table, common_setting, findings, title_of
from igrpo_nemo.evaluation.tables import tables as evaluation_tables
from igrpo_nemo.files.atomic import write_or_refuse
from igrpo_nemo.report.figures import EVALUATION, Figure, draw_figures, group_colors, pass_figure
from igrpo_nemo.report.runs import Run, load_runs
from igrpo_nemo.report.tables import budget_rows, headline_facts, run_rows, sample_rows, template

SECTIONS = ("Outcome", "Two stages", "Policy", "Optimisation", "Cost")
HERE = Path(__file__).parent


def build_report(
    run_dirs: Sequence[Path | str],
    out: Path | str | None = None,
    *,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    introduction: str = "",
    tables: Sequence[Table] = (),
    anyway: bool = False,
) -> Path:
    """Write the report of one run, or of several overlaid, and return the path of the HTML file.

    Folders that hold an evaluation's output are compared with each other on the same page, with the
    first as reference, and with `anyway` also where their settings differ. `labels` group runs (an
    equal label: seeds of one arm, drawn as mean and range); by default each run stands for itself.
    `introduction` and `tables` go to the top. `out` defaults to
    `report.html` in the folder, or in the parent of the first of several.
    Raises `UserError` naming a folder without usable metrics, or an output that cannot be written.
    """
    folders = [Path(folder) for folder in run_dirs]
    evaluated = [folder for folder in folders if is_evaluation(folder)]
    trained = [folder for folder in folders if folder not in evaluated]
    runs = load_runs(trained, labels) if trained or not evaluated else []
    evaluation = compared(load_systems(evaluated), anyway=anyway) if evaluated else None
    page = {"introduction": introduction, "tables": tables, "evaluation": evaluation}
    html = render(runs, title=title, **page)
    own = [run.path for run in runs] or evaluated
    default = (own[0] if len(own) == 1 else own[0].resolve().parent) / "report.html"
    return write_page(default if out is None else Path(out), html)


def render(
    runs: Sequence[Run],
    *,
    title: str | None = None,
    introduction: str = "",
    tables: Sequence[Table] = (),
    evaluation: Comparison | None = None,
) -> str:
    """The page as text, of runs, of evaluations, or of both."""
    figures = draw_figures(runs) if runs else []
    sections = SECTIONS if runs else ()
    if evaluation is not None:
        figures.append(pass_figure(evaluation))
        sections = (EVALUATION, *sections)
    samples, total_samples = sample_rows(runs)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template("page.html.j2").render(
        title=title or _title(runs, evaluation),
        introduction=introduction,
        tables=tables,
        runs=runs,
        several=len(runs) > 1,
        facts=headline_facts(runs[0]) if len(runs) == 1 else (),
        run_table=run_rows(runs) if len(runs) > 1 else None,
        colors=group_colors(run.label for run in runs),
        sections=[(name, _split(figures, name)) for name in sections],
        evaluation_section=EVALUATION,
        evaluation_setting=common_setting(evaluation) if evaluation else "",
        findings=findings(evaluation) if evaluation else (),
        evaluation_tables=evaluation_tables(evaluation) if evaluation else (),
        # Seeds of one arm have one budget.
        budgets={run.label: rows for run in runs if (rows := budget_rows(run))}.items(),
        samples=samples,
        total_samples=total_samples,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=digest,
    )


def _split(figures: Sequence[Figure], section: str) -> tuple[list[Figure], list[Figure]]:
    """Figures of a section: those to show, and those that are absent (named in one list)."""
    own = [figure for figure in figures if figure.section == section]
    return [f for f in own if not f.missing], [f for f in own if f.missing]


def _title(runs: Sequence[Run], evaluation: Comparison | None) -> str:
    if not runs and evaluation is not None:
        return title_of(evaluation)
    if len(runs) == 1:
        return f"Run {runs[0].name}"
    labels = list(dict.fromkeys(run.label for run in runs))
    return f"Comparison of {len(runs)} runs" if len(labels) > 4 else " · ".join(labels)


def write_page(path: Path, html: str) -> Path:
    """Write a page whole or not at all. Raises `UserError` where it cannot be written."""
    # Model text may hold lone surrogates, which UTF-8 has no bytes for.
    write_or_refuse(path, html.encode("utf-8", "replace"))
    return path

"""Which figures a report has, what each shows, and what to look for in it.

    figures.yaml + runs --draw_figures--> Figure with panels and legend, or a sentence of absence

One run: the metrics of a figure share one panel, coloured by stage. Several runs: a panel a metric,
coloured by label; runs with an equal label (seeds of one arm) are a mean line in a min-max band.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from markupsafe import Markup

from igrpo_nemo.evaluation.statistics import Estimate
from igrpo_nemo.evaluation.systems import Comparison
from igrpo_nemo.report.charts import Axis, Line, line_chart, running_mean, smoothing_window
from igrpo_nemo.report.runs import Curve, Run

EVALUATION = "Evaluation"
"""The section of a comparison of evaluations."""
GROUP_COLORS = ("g0", "g1", "g2", "g3", "g4", "g5", "g6", "g7")


@dataclass(frozen=True, slots=True)
class Trace:
    """A metric in a figure. `stderr` names the metric with its standard error, drawn as a band.

    One that ends with `*` stands for all that begin so, each with the rest of its name as label.
    """

    metric: str
    label: str = ""
    color: str = ""
    dashed: bool = False
    stderr: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure: `caption` says what to look for, `absent` why its metrics may be missing.

    Drawn, it has `panels`, each a title ("" where the figure's says it) and an SVG, and the
    `legend` that they share, of (label, colour, dashed); or the sentence `missing`.
    """

    key: str
    section: str
    title: str
    caption: str
    axis: Axis
    traces: tuple[Trace, ...] = ()
    absent: str = "These metrics were not logged."
    kind: str = "train"
    smooth: bool = True
    panels: tuple[tuple[str, Markup], ...] = ()
    legend: tuple[tuple[str, str, bool], ...] = ()
    note: str = ""
    missing: str = ""

    def curve(self, run: Run, metric: str) -> Curve:
        return (run.val if self.kind == "val" else run.train).get(metric, Curve())

    def window(self, count: int) -> int:
        """Points in the running mean that is drawn of `count` points."""
        return smoothing_window(count) if self.kind == "train" and self.smooth else 1


FIGURES: tuple[Figure, ...] = tuple(
    Figure(**{**e, "axis": Axis(**e["axis"]), "traces": tuple(Trace(**t) for t in e["traces"])})
    for e in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
)


def draw_figures(runs: Sequence[Run]) -> list[Figure]:
    """Every figure of the report for these runs, in order; absent ones hold a sentence."""
    return [draw_figure(figure, runs) for figure in FIGURES]


def draw_figure(figure: Figure, runs: Sequence[Run]) -> Figure:
    """One figure. Traces that no run has logged are left out; a figure without any says so."""
    logged = [t for t in _traces(figure, runs) if any(figure.curve(r, t.metric) for r in runs)]
    if not logged:
        return replace(figure, missing=figure.absent)
    if len(runs) == 1:
        lines = [_line(figure, trace, runs[0], trace.label, trace.color) for trace in logged]
        charts = [("", lines)]
    else:
        found = [(trace.label, _one_metric(figure, trace, runs)) for trace in logged]
        charts = [(name, lines) for name, lines in found if lines]
    if not charts:
        return replace(figure, missing="The runs of each label share no step.")
    panels = tuple(
        (name * (len(charts) > 1), line_chart(lines, figure.axis, f"{figure.title} {name}".strip()))
        for name, lines in charts
    )
    entries = dict.fromkeys((x.label, x.color, x.dashed) for _, lines in charts for x in lines)
    counts = [len(figure.curve(run, trace.metric).steps) for run in runs for trace in logged]
    window = figure.window(max(counts))
    note = f"Thick lines: mean of the last {window} steps." if window > 1 else ""
    return replace(figure, panels=panels, legend=tuple(entries), note=note)


def group_colors(labels: Iterable[str]) -> dict[str, str]:
    """Label -> colour name, in order of first appearance; repeats after eight labels."""
    return dict(zip(dict.fromkeys(labels), itertools.cycle(GROUP_COLORS), strict=False))


def mean_curve(curves: Sequence[Curve]) -> tuple[Curve, tuple[float, ...], tuple[float, ...]]:
    """Mean, minimum and maximum over curves at every step that all of them have logged.

    Only common steps count: a mean over whichever runs got that far would jump where one ends.
    """
    common = sorted(set.intersection(*(set(curve.steps) for curve in curves)))
    at = [dict(zip(curve.steps, curve.values, strict=True)) for curve in curves]
    columns = [[values[step] for values in at] for step in common]
    mean = Curve(tuple(common), tuple(sum(column) / len(column) for column in columns))
    return mean, tuple(min(column) for column in columns), tuple(max(column) for column in columns)


def _traces(figure: Figure, runs: Sequence[Run]) -> Iterable[Trace]:
    for trace in figure.traces:
        if not trace.metric.endswith("*"):
            yield trace
            continue
        prefix = trace.metric[:-1]
        names = {name for run in runs for name in run.train if name.startswith(prefix)}
        for name, color in group_colors(sorted(names)).items():
            label = name.removeprefix(prefix).replace("_", " ")
            yield replace(trace, metric=name, label=label, color=color)


def _one_metric(figure: Figure, trace: Trace, runs: Sequence[Run]) -> list[Line]:
    """A line a label; runs of one label become their mean in a band from minimum to maximum."""
    lines = []
    for label, color in group_colors(run.label for run in runs).items():
        members = [r for r in runs if r.label == label and figure.curve(r, trace.metric)]
        if len(members) == 1:
            own = replace(trace, dashed=False)
            lines.append(_line(figure, own, members[0], label, color))
        elif members:
            mean, low, high = mean_curve([figure.curve(run, trace.metric) for run in members])
            if mean:
                window = figure.window(len(mean.steps))
                y, low, high = (running_mean(v, window) for v in (mean.values, low, high))
                name, dots = f"{label} (mean of {len(members)})", figure.kind == "val"
                lines.append(Line(name, color, mean.steps, y, markers=dots, low=low, high=high))
    return lines


def _line(figure: Figure, trace: Trace, run: Run, label: str, color: str) -> Line:
    curve, stderr = figure.curve(run, trace.metric), figure.curve(run, trace.stderr)
    window = figure.window(len(curve.steps))
    y = running_mean(curve.values, window)
    line = Line(label, color, curve.steps, y, trace.dashed, markers=figure.kind == "val")
    if stderr:
        widths = dict(zip(stderr.steps, stderr.values, strict=True))
        return _with_band(line, [widths.get(step, 0.0) for step in curve.steps])
    return replace(line, raw=curve.values if window > 1 else ())


def _with_band(line: Line, errors: Sequence[float]) -> Line:
    """A band of one standard error to either side of what is a fraction."""
    pairs = list(zip(line.y, errors, strict=True))
    low, high = tuple(max(0.0, y - e) for y, e in pairs), tuple(min(1.0, y + e) for y, e in pairs)
    return replace(line, low=low, high=high)


PASS = Figure(
    key="pass-at-k",
    section=EVALUATION,
    title="pass@k",
    caption="Share of problems with a right answer among k samples: the unbiased estimate from all "
    "samples (arXiv 2107.03374). Bands are one standard error over problems. Curves that meet at "
    "large k mean that training made likely what the other model could already find.",
    axis=Axis("problems solved", True, x_label="k, samples", x_name="k =", x_log=True),
)


def pass_figure(comparison: Comparison) -> Figure:
    """Unbiased pass@k over k, a panel a benchmark, with a band of one standard error over
    problems."""
    colors = group_colors(system.label for system in comparison.systems)
    panels = []
    for name in comparison.benchmarks:
        found = {s.label: s.benchmarks[name] for s in comparison.systems}
        lines = [
            _passes(label, colors[label], one.passes)
            for label, one in found.items()
            if one.num_samples > 1
        ]
        if lines:
            panels.append((name, line_chart(lines, PASS.axis, f"pass@k, {name}")))
    if not panels:
        missing = "Every benchmark has one sample a problem: give several for pass@k."
        return replace(PASS, missing=missing)
    legend = tuple((label, color, False) for label, color in colors.items())
    return replace(PASS, panels=tuple(panels), legend=legend)


def _passes(label: str, color: str, passes: Mapping[int, Estimate]) -> Line:
    means = tuple(each.mean for each in passes.values())
    line = Line(label, color, tuple(map(float, passes)), means, markers=True)
    return _with_band(line, [each.problems or 0.0 for each in passes.values()])

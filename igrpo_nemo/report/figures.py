"""Which figures a report has, what each shows, and what to look for in it.

    figures.yaml + runs --draw_figures--> Figure(panels, legend, caption) or a sentence of absence

One run: the metrics of a figure share one panel, coloured by stage. Several runs: a panel a metric,
coloured by label; runs with an equal label (seeds of one arm) are a mean line in a min-max band.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
    """A metric in a figure. `stderr` names the metric with its standard error, drawn as bars."""

    metric: str
    label: str
    color: str
    dashed: bool = False
    stderr: str = ""


@dataclass(frozen=True, slots=True)
class Spec:
    """A figure to be: `caption` says what to look for; `absent` why it may be missing."""

    key: str
    section: str
    title: str
    axis: Axis
    traces: tuple[Trace, ...]
    caption: str
    absent: str = "These metrics were not logged."
    kind: str = "train"
    smooth: bool = True


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart with its own title, "" where the figure's says it."""

    title: str
    svg: Markup


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure to show: panels, or none and the sentence that says why.

    `legend` entries are (label, colour, dashed); several panels share the figure's.
    """

    key: str
    section: str
    title: str
    caption: str
    panels: tuple[Panel, ...] = ()
    legend: tuple[tuple[str, str, bool], ...] = ()
    note: str = ""
    missing: str = ""


def _spec(axis: dict[str, Any], traces: list[dict[str, Any]], **rest: Any) -> Spec:
    return Spec(axis=Axis(**axis), traces=tuple(Trace(**trace) for trace in traces), **rest)


FIGURES: tuple[Spec, ...] = tuple(
    _spec(**entry)
    for entry in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
)


def draw_figures(runs: Sequence[Run]) -> list[Figure]:
    """Every figure of the report for these runs, in order; absent ones hold a sentence."""
    return [draw_figure(spec, runs) for spec in FIGURES]


def draw_figure(spec: Spec, runs: Sequence[Run]) -> Figure:
    """One figure. Traces that no run has logged are left out; a figure without any says so."""
    figure = Figure(spec.key, spec.section, spec.title, spec.caption)
    logged = [t for t in spec.traces if any(_curve(run, spec, t.metric) for run in runs)]
    if not logged:
        return replace(figure, missing=spec.absent)
    if len(runs) == 1:
        charts = [("", _one_run(spec, logged, runs[0]))]
    else:
        charts = [(trace.label, _one_metric(spec, trace, runs)) for trace in logged]
    charts = [(name, lines) for name, lines in charts if lines]
    if not charts:
        return replace(figure, missing="The runs of each label share no step.")
    panels = tuple(
        Panel(name if len(charts) > 1 else "", line_chart(lines, spec.axis, f"{spec.title} {name}"))
        for name, lines in charts
    )
    entries = dict.fromkeys((x.label, x.color, x.dashed) for _, lines in charts for x in lines)
    counts = [len(_curve(run, spec, trace.metric).steps) for run in runs for trace in logged]
    window = max(_window(spec, count) for count in counts)
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


def _one_run(spec: Spec, traces: Sequence[Trace], run: Run) -> list[Line]:
    return [
        _line(spec, trace, curve, _curve(run, spec, trace.stderr))
        for trace in traces
        if (curve := _curve(run, spec, trace.metric))
    ]


def _one_metric(spec: Spec, trace: Trace, runs: Sequence[Run]) -> list[Line]:
    """A line a label; runs of one label become their mean in a band from minimum to maximum."""
    lines = []
    for label, color in group_colors(run.label for run in runs).items():
        members = [run for run in runs if run.label == label and _curve(run, spec, trace.metric)]
        curves = [_curve(run, spec, trace.metric) for run in members]
        if len(members) == 1:
            own = replace(trace, label=label, color=color, dashed=False)
            lines.append(_line(spec, own, curves[0], _curve(members[0], spec, trace.stderr)))
        elif members:
            mean, low, high = mean_curve(curves)
            if mean:
                name = f"{label} (mean of {len(members)})"
                lines.append(_seeds(spec, name, color, mean, low, high))
    return lines


def _line(spec: Spec, trace: Trace, curve: Curve, stderr: Curve) -> Line:
    window = _window(spec, len(curve.steps))
    widths = dict(zip(stderr.steps, stderr.values, strict=True))
    return Line(
        trace.label,
        trace.color,
        curve.steps,
        running_mean(curve.values, window),
        dashed=trace.dashed,
        markers=spec.kind == "val",
        error=tuple(widths.get(step, 0.0) for step in curve.steps) if widths else (),
        raw=curve.values if window > 1 else (),
    )


def _seeds(spec: Spec, label: str, color: str, mean: Curve, low, high) -> Line:
    window = _window(spec, len(mean.steps))
    y, below, above = (running_mean(values, window) for values in (mean.values, low, high))
    return Line(label, color, mean.steps, y, markers=spec.kind == "val", low=below, high=above)


def _window(spec: Spec, count: int) -> int:
    return smoothing_window(count) if spec.kind == "train" and spec.smooth else 1


def _curve(run: Run, spec: Spec, metric: str) -> Curve:
    return (run.val if spec.kind == "val" else run.train).get(metric, Curve())


def pass_figure(comparison: Comparison) -> Figure:
    """Unbiased pass@k over k, a panel a benchmark, with a band of one standard error over
    problems."""
    caption = (
        "Share of problems with a right answer among k samples: the unbiased estimate from all "
        "samples (arXiv 2107.03374). Bands are one standard error over problems. Curves that meet "
        "at large k mean that training made likely what the other model could already find."
    )
    figure = Figure("pass-at-k", EVALUATION, "pass@k", caption)
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
            axis = Axis("problems solved", percent=True)
            named = f"pass@k, {name}"
            chart = line_chart(lines, axis, named, x_label="k, samples", x_name="k =", x_log=True)
            panels.append(Panel(name, chart))
    if not panels:
        missing = "Every benchmark has one sample a problem: give several for pass@k."
        return replace(figure, missing=missing)
    legend = tuple((label, color, False) for label, color in colors.items())
    return replace(figure, panels=tuple(panels), legend=legend)


def _passes(label: str, color: str, passes: Mapping[int, Estimate]) -> Line:
    means = tuple(each.mean for each in passes.values())
    errors = [each.problems or 0.0 for each in passes.values()]
    low = tuple(max(0.0, m - e) for m, e in zip(means, errors, strict=True))
    high = tuple(min(1.0, m + e) for m, e in zip(means, errors, strict=True))
    return Line(label, color, tuple(map(float, passes)), means, markers=True, low=low, high=high)

"""Figures of a comparison of evaluations: pass@k curves, a panel a benchmark."""

from __future__ import annotations

from igrpo_nemo.evaluation.results import BenchmarkResults
from igrpo_nemo.evaluation.systems import Comparison
from igrpo_nemo.report.charts import Axis, Line, line_chart
from igrpo_nemo.report.figures import Figure, Panel, group_colors

SECTION = "Evaluation"


def pass_figure(comparison: Comparison) -> Figure:
    """Unbiased pass@k over k, with a band of one standard error over problems."""
    caption = (
        "Share of problems with a right answer among k samples: the unbiased estimate from all "
        "samples (arXiv 2107.03374). Bands are one standard error over problems. Curves that meet "
        "at large k mean that training made likely what the other model could already find."
    )
    key, title = "pass-at-k", "pass@k"
    colors = group_colors(system.label for system in comparison.systems)
    panels = []
    for name in comparison.benchmarks:
        lines = [
            _curve(system.label, colors[system.label], system.benchmarks[name])
            for system in comparison.systems
            if system.benchmarks[name].num_samples > 1
        ]
        if lines:
            axis = Axis("problems solved", percent=True)
            named = f"pass@k, {name}"
            chart = line_chart(lines, axis, named, x_label="k, samples", x_name="k =", x_log=True)
            panels.append(Panel(name, chart))
    if not panels:
        missing = "Every benchmark has one sample a problem: give several for pass@k."
        return Figure(key, SECTION, title, caption, missing=missing)
    legend = tuple((label, color, False) for label, color in colors.items())
    return Figure(key, SECTION, title, caption, tuple(panels), legend)


def _curve(label: str, color: str, found: BenchmarkResults) -> Line:
    ks = tuple(found.passes)
    means = tuple(found.passes[k].mean for k in ks)
    errors = [found.passes[k].problems or 0.0 for k in ks]
    return Line(
        label,
        color,
        tuple(float(k) for k in ks),
        means,
        markers=True,
        low=tuple(max(0.0, m - e) for m, e in zip(means, errors, strict=True)),
        high=tuple(min(1.0, m + e) for m, e in zip(means, errors, strict=True)),
    )

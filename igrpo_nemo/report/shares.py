"""Figures made of parts of a whole: where the seconds of a step go, and why completions score.

One run: stacked bars over training. Several: one horizontal bar a label, means over all steps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from markupsafe import Markup

from igrpo_nemo.report.charts import MAX_BARS, Axis, Layer, bar_rows, stacked_chart
from igrpo_nemo.report.figures import GROUP_COLORS, Figure, Panel
from igrpo_nemo.report.runs import Curve, Run

Parts = dict[tuple[str, str], Curve]
"""(label, colour) -> its values over training."""

TIMING = (
    ("timing/draft", "sample drafts", "draft"),
    ("timing/refine", "sample refinements", "refine"),
    ("timing/reward", "score", "best"),
    ("timing/train", "train", "val"),
    ("timing/val", "validate", "predict2"),
    ("timing/checkpoint", "save", "bad"),
)

TIME_CAPTION = (
    "Means over steps; “other” is what the step's total holds beyond the named parts. Two stages "
    "sample twice, one after the other: that is iGRPO's extra cost over GRPO."
)
REASON_CAPTION = (
    "Verdict of the accuracy reward over all completions. “no answer” should vanish early; what "
    "then remains is right or wrong."
)


def time_figure(runs: Sequence[Run]) -> Figure:
    """Seconds of a step by activity."""
    figure = Figure("time", "Cost", "Where the time goes", TIME_CAPTION)
    return _drawn(figure, Axis("seconds per step"), runs, _time_parts)


def reason_figure(runs: Sequence[Run]) -> Figure:
    """Fractions of completions by the accuracy reward's reason."""
    figure = Figure("reasons", "Two stages", "Why completions score", REASON_CAPTION)
    return _drawn(figure, Axis("share of completions", percent=True), runs, _reason_parts)


def _drawn(
    figure: Figure, axis: Axis, runs: Sequence[Run], parts_of: Callable[[Run], Parts]
) -> Figure:
    logged = [(run.label, parts) for run in runs if (parts := parts_of(run))]
    if not logged:
        return replace(figure, missing="These metrics were not logged.")
    if len(runs) == 1:
        ((_, parts),) = logged
        colors, svg = dict(parts), _over_steps(parts, axis, figure.title)
    else:
        rows = _means_by_label(logged)
        colors = dict.fromkeys(part for means in rows.values() for part in means)
        layers = {
            label: [Layer(name, color, (mean,)) for (name, color), mean in means.items()]
            for label, means in rows.items()
        }
        svg = bar_rows(list(layers.items()), axis, title=figure.title)
    legend = tuple((name, color, False) for name, color in colors)
    return replace(figure, panels=(Panel("", svg),), legend=legend)


def _time_parts(run: Run) -> Parts:
    parts = {
        (label, color): run.train[name] for name, label, color in TIMING if run.train.get(name)
    }
    whole = run.train.get("timing/step")
    if whole and parts:
        named = [dict(zip(curve.steps, curve.values, strict=True)) for curve in parts.values()]
        rest = tuple(
            max(0.0, value - sum(part.get(step, 0.0) for part in named))
            for step, value in zip(whole.steps, whole.values, strict=True)
        )
        parts["other", "predict"] = Curve(whole.steps, rest)
    return parts


def _reason_parts(run: Run) -> Parts:
    prefix = "reward/reason/"
    fixed = {"match": "val", "mismatch": "bad", "no_answer": "predict"}
    names = sorted(name for name in run.train if name.startswith(prefix))
    spare = iter(GROUP_COLORS * (1 + len(names) // len(GROUP_COLORS)))
    parts = {}
    for name in sorted(names, key=lambda n: (n.removeprefix(prefix) not in fixed, n)):
        reason = name.removeprefix(prefix)
        parts[reason.replace("_", " "), fixed.get(reason) or next(spare)] = run.train[name]
    return parts


def _over_steps(parts: Parts, axis: Axis, title: str) -> Markup:
    """Bars of means per logged step; a part absent from a step (validation) counts as 0."""
    steps = {step for curve in parts.values() for step in curve.steps}
    first, length = min(steps), max(steps) - min(steps) + 1
    width = max(1, math.ceil(length / MAX_BARS))
    bars = math.ceil(length / width)
    counts = Counter((step - first) // width for step in steps)
    layers = []
    for (label, color), curve in parts.items():
        sums = [0.0] * bars
        for step, value in zip(curve.steps, curve.values, strict=True):
            sums[(step - first) // width] += value
        means = tuple(total / max(counts[i], 1) for i, total in enumerate(sums))
        layers.append(Layer(label, color, means))
    edges = [first + i * width for i in range(bars + 1)]
    return stacked_chart(layers, axis, edges=edges, title=title)


def _means_by_label(logged: Sequence[tuple[str, Parts]]) -> dict[str, dict[tuple[str, str], float]]:
    """Label -> part -> its mean over the steps of the label's runs."""
    found: dict[str, dict[tuple[str, str], float]] = {}
    sizes = Counter(label for label, _ in logged)
    for label, parts in logged:
        steps = len({step for curve in parts.values() for step in curve.steps})
        means = found.setdefault(label, {})
        for part, curve in parts.items():
            means[part] = means.get(part, 0.0) + sum(curve.values) / steps / sizes[label]
    return found

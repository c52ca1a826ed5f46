"""Figures made of parts of a whole: where the seconds of a step go, and why completions score.

One run: stacked bars over training. Several: one horizontal bar a label, means over all steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from igrpo_nemo.report.charts import MAX_BARS, Axis, Layer, bar_rows, stacked_chart
from igrpo_nemo.report.figures import GROUP_COLORS, Figure, Panel
from igrpo_nemo.report.runs import Curve, Run

Legend = tuple[tuple[str, str, bool], ...]

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
    axis = Axis("seconds per step")
    return _figure("time", "Cost", "Where the time goes", TIME_CAPTION, axis, runs, _time_parts)


def reason_figure(runs: Sequence[Run]) -> Figure:
    """Fractions of completions by the accuracy reward's reason."""
    axis = Axis("share of completions", percent=True)
    return _figure(
        "reasons", "Two stages", "Why completions score", REASON_CAPTION, axis, runs, _reason_parts
    )


def _figure(key, section, title, caption, axis: Axis, runs: Sequence[Run], parts_of) -> Figure:
    parts = {id(run): parts_of(run) for run in runs}
    if not any(parts.values()):
        return Figure(key, section, title, caption, missing="These metrics were not logged.")
    if len(runs) == 1:
        panel, legend = _over_steps(parts[id(runs[0])], axis, title)
    else:
        panel, legend = _by_label({id_: p for id_, p in parts.items() if p}, runs, axis, title)
    return Figure(key, section, title, caption, (panel,), legend)


def _time_parts(run: Run) -> dict[tuple[str, str], Curve]:
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


def _reason_parts(run: Run) -> dict[tuple[str, str], Curve]:
    prefix = "reward/reason/"
    fixed = {"match": "val", "mismatch": "bad", "no_answer": "predict"}
    names = sorted(name for name in run.train if name.startswith(prefix))
    spare = iter(GROUP_COLORS * (1 + len(names) // len(GROUP_COLORS)))
    parts = {}
    for name in sorted(names, key=lambda n: (n.removeprefix(prefix) not in fixed, n)):
        reason = name.removeprefix(prefix)
        parts[reason.replace("_", " "), fixed.get(reason) or next(spare)] = run.train[name]
    return parts


def _over_steps(
    parts: Mapping[tuple[str, str], Curve], axis: Axis, title: str
) -> tuple[Panel, Legend]:
    first = min(curve.steps[0] for curve in parts.values())
    last = max(curve.steps[-1] for curve in parts.values())
    width = max(1, math.ceil((last - first + 1) / MAX_BARS))
    bars = math.ceil((last - first + 1) / width)
    edges = [first + i * width for i in range(bars + 1)]
    layers = [
        Layer(label, color, _bar_means(curve, first, width, bars, _logged_steps(parts)))
        for (label, color), curve in parts.items()
    ]
    legend = tuple((layer.label, layer.color, False) for layer in layers)
    return Panel("", stacked_chart(layers, axis, edges=edges, title=title)), legend


def _logged_steps(parts: Mapping[tuple[str, str], Curve]) -> set[int]:
    return {step for curve in parts.values() for step in curve.steps}


def _bar_means(
    curve: Curve, first: int, width: int, bars: int, logged: set[int]
) -> tuple[float, ...]:
    """Mean per logged step in each bar; a part absent from a step (validation) counts as 0."""
    sums, counts = [0.0] * bars, [0] * bars
    for step in logged:
        counts[(step - first) // width] += 1
    for step, value in zip(curve.steps, curve.values, strict=True):
        sums[(step - first) // width] += value
    return tuple(s / c if c else 0.0 for s, c in zip(sums, counts, strict=True))


def _by_label(
    parts: Mapping[int, Mapping], runs: Sequence[Run], axis: Axis, title: str
) -> tuple[Panel, Legend]:
    rows, legend = [], {}
    for label in dict.fromkeys(run.label for run in runs):
        members = [parts[id(run)] for run in runs if run.label == label and id(run) in parts]
        means: dict[tuple[str, str], float] = {}
        for member in members:
            steps = len(_logged_steps(member))
            for part, curve in member.items():
                means[part] = means.get(part, 0.0) + sum(curve.values) / steps / len(members)
        layers = [Layer(name, color, (value,)) for (name, color), value in means.items()]
        legend.update({name: color for name, color in means})
        if layers:
            rows.append((label, layers))
    entries = tuple((name, color, False) for name, color in legend.items())
    return Panel("", bar_rows(rows, axis, title=title)), entries

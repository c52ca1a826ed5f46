"""Which figures a report has, what each shows, and what to look for in it.

    FIGURES (data) + runs --draw_figures--> Figure(panels, legend, caption) or a sentence of absence

One run: the metrics of a figure share one panel, coloured by stage. Several runs: a panel a metric,
coloured by label; runs with an equal label (seeds of one arm) are a mean line in a min-max band.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from igrpo_nemo.report.charts import Axis, Line, line_chart, running_mean, smoothing_window
from igrpo_nemo.report.runs import Curve, Run

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


NO_STAGE_2 = "Not logged: without feedback there is no second stage."

FIGURES: tuple[Spec, ...] = (
    Spec(
        "validation", "Outcome", "Held-out accuracy",
        Axis("correct answers, one per problem", percent=True),
        (
            Trace("val/accuracy", "bare prompt", "val", stderr="val/accuracy_stderr"),
            Trace("val/draft_conditioned_accuracy", "with a draft shown", "refine", dashed=True),
        ),
        "Validation never sees a draft: a rise here is what training passed on to the bare prompt. "
        "Bars are one standard error over problems: differences within them say little.",
        "No validation was run.",
        kind="val",
    ),
    Spec(
        "reward", "Outcome", "Reward by stage",
        Axis("mean reward"),
        (
            Trace("igrpo/draft_reward", "drafts", "draft"),
            Trace("igrpo/best_draft_reward", "best draft", "best"),
            Trace("igrpo/selected_draft_reward", "shown draft", "predict", dashed=True),
            Trace("igrpo/refinement_reward", "refinements", "refine"),
        ),
        "Drafts should follow refinements upwards. Refinements that stay at the shown draft's "
        "level only repeat it.",
    ),
    Spec(
        "accuracy", "Two stages", "Training accuracy by stage",
        Axis("correct answers", percent=True),
        (
            Trace("igrpo/draft_accuracy", "drafts", "draft"),
            Trace("igrpo/best_draft_accuracy", "any draft", "best"),
            Trace("igrpo/selected_draft_accuracy", "shown draft", "predict", dashed=True),
            Trace("igrpo/refinement_accuracy", "refinements", "refine"),
        ),
        "The reward without its format part. Compare refinements with their shown draft.",
    ),
    Spec(
        "best-draft", "Two stages", "Best-draft success against 1-(1-p)^N",
        Axis("problems with at least one correct draft", percent=True),
        (
            Trace("igrpo/best_draft_accuracy", "measured", "best"),
            Trace("igrpo/best_draft_predicted", "from own p", "predict", dashed=True),
            Trace("igrpo/best_draft_predicted_pooled", "from mean p", "predict2", dashed=True),
        ),
        "Proposition 3.1. The prediction from each problem's own p lies a little "
        "below the measurement (p is estimated from the same N drafts), the one from the mean p "
        "above it, the more so the more the problems differ in difficulty (Jensen).",
        NO_STAGE_2,
    ),
    Spec(
        "lift", "Two stages", "Lift of the second stage",
        Axis("refinement accuracy minus shown draft's", percent=True, zero=True),
        (Trace("igrpo/lift", "lift", "refine"),),
        "Above zero, refining improves on the draft it was shown. With a best-of-N draft the bar "
        "is high: zero means that refinements are as good as the best of N.",
        NO_STAGE_2,
    ),
    Spec(
        "better-worse", "Two stages", "Refinements better or worse than their draft",
        Axis("refinements", percent=True),
        (
            Trace("igrpo/refinement_better", "better", "refine"),
            Trace("igrpo/refinement_worse", "worse", "bad", dashed=True),
        ),
        "By reward. Both falling to zero together means copying, not agreement.",
        NO_STAGE_2,
    ),
    Spec(
        "copying", "Two stages", "Copying of the shown draft",
        Axis("share of refinements; overlap", percent=True),
        (
            Trace("igrpo/copy_rate", "verbatim copies", "refine"),
            Trace("igrpo/overlap", "token overlap (Dice)", "best", dashed=True),
        ),
        "A rising copy rate with fewer groups of non-zero advantage (next figure) means that the "
        "second stage teaches less and less.",
        NO_STAGE_2,
    ),
    Spec(
        "advantage", "Two stages", "Groups that teach something",
        Axis("share", percent=True),
        (
            Trace("igrpo/nonzero_advantage_groups", "trained groups with unequal rewards", "val"),
            Trace("igrpo/skipped_rate", "problems skipped", "bad", dashed=True),
        ),
        "A group whose rewards are all equal has advantage zero and adds no gradient.",
    ),
    Spec(
        "entropy", "Policy", "Entropy of the policy",
        Axis("nats per token"),
        (
            Trace("entropy/exact", "exact, over the vocabulary (Eq. 7)", "refine"),
            Trace("entropy/sampled", "estimate, from sampled tokens", "draft", dashed=True),
        ),
        "On the trained tokens. The estimate is unbiased but noisy; the two should agree on "
        "average. A fall to zero early on means lost exploration.",
    ),
    Spec(
        "lengths", "Policy", "Response lengths",
        Axis("mean tokens"),
        (
            Trace("igrpo/draft_tokens", "drafts", "draft"),
            Trace("igrpo/refinement_tokens", "refinements", "refine"),
            Trace("igrpo/refine_prompt_tokens", "prompt with a draft", "predict", dashed=True),
        ),
        "The refinement's prompt contains a draft, so it grows with the drafts.",
    ),
    Spec(
        "truncation", "Policy", "Cut-off texts",
        Axis("share", percent=True),
        (
            Trace("igrpo/draft_truncated_rate", "drafts at the token limit", "draft"),
            Trace("igrpo/refinement_truncated_rate", "refinements at the token limit", "refine"),
            Trace("igrpo/draft_clipped_rate", "shown drafts shortened", "predict", dashed=True),
        ),
        "Cut-off completions rarely hold an answer: above a few percent, raise the limit.",
    ),
    Spec(
        "format", "Policy", "Well-formed completions",
        Axis("completions with the asked-for tags", percent=True),
        (
            Trace("igrpo/draft_format", "drafts", "draft"),
            Trace("igrpo/refinement_format", "refinements", "refine"),
        ),
        "Format is usually learnt first; reward that rises through format alone is no gain.",
    ),
    Spec(
        "loss", "Optimisation", "Loss", Axis("loss", zero=True), (Trace("loss", "loss", "val"),),
        "Of little meaning by itself in policy-gradient training: look for jumps, not a descent.",
    ),
    Spec(
        "grad-norm", "Optimisation", "Gradient norm", Axis("norm before clipping"),
        (Trace("grad_norm", "gradient norm", "val"),),
        "Spikes that outlast a few steps announce a collapse.",
    ),
    Spec(
        "lr", "Optimisation", "Learning rate", Axis("learning rate"),
        (Trace("lr", "learning rate", "val"),),
        "Warm-up, then the decay asked for.",
        smooth=False,
    ),
    Spec(
        "clip", "Optimisation", "Clipped tokens", Axis("share of trained tokens", percent=True),
        (Trace("policy/clip_fraction", "outside the clip range", "val"),),
        "Zero with one update per rollout: the ratio is then 1 by construction.",
    ),
    Spec(
        "kl", "Optimisation", "KL to the reference policy", Axis("nats per token"),
        (Trace("policy/kl", "KL (k3 estimate)", "val"),),
        "Distance from the reference policy; zero where none is loaded.",
        "Not logged: without a KL penalty no reference policy is loaded.",
    ),
    Spec(
        "ratio", "Optimisation", "Importance ratio", Axis("ratio to the sampling policy"),
        (
            Trace("policy/ratio_mean", "mean", "val"),
            Trace("policy/ratio_max", "maximum", "bad", dashed=True),
        ),
        "Close to 1 in the mean; a growing maximum asks for fewer updates per rollout.",
    ),
    Spec(
        "throughput", "Cost", "Throughput", Axis("completions per second"),
        (Trace("perf/completions_per_s", "completions", "val"),),
        "Falls as responses grow longer.",
    ),
    Spec(
        "tokens", "Cost", "Token throughput", Axis("sampled tokens per second"),
        (Trace("perf/tokens_per_s", "tokens", "val"),),
        "Steadier than completions per second: it does not depend on how long responses are.",
    ),
    Spec(
        "memory", "Cost", "Peak memory", Axis("GB"), (Trace("perf/peak_memory_gb", "peak", "val"),),
        "Should be level after the first steps.",
    ),
)  # fmt: skip


def draw_figures(runs: Sequence[Run]) -> list[Figure]:
    """Every figure of the report for these runs, in order; absent ones hold a sentence."""
    return [draw_figure(spec, runs) for spec in FIGURES]


def draw_figure(spec: Spec, runs: Sequence[Run]) -> Figure:
    """One figure. Traces that no run has logged are left out; a figure without any says so."""
    logged = [t for t in spec.traces if any(_curve(run, spec, t.metric) for run in runs)]
    if not logged:
        return Figure(spec.key, spec.section, spec.title, spec.caption, missing=spec.absent)
    if len(runs) == 1:
        charts = [("", _one_run(spec, logged, runs[0]))]
    else:
        charts = [(trace.label, _one_metric(spec, trace, runs)) for trace in logged]
    charts = [(name, lines) for name, lines in charts if lines]
    if not charts:
        sentence = "The runs of each label share no step."
        return Figure(spec.key, spec.section, spec.title, spec.caption, missing=sentence)
    panels = tuple(
        Panel(
            name if len(charts) > 1 else "",
            line_chart(lines, spec.axis, title=f"{spec.title} {name}"),
        )
        for name, lines in charts
    )
    entries = dict.fromkeys((x.label, x.color, x.dashed) for _, lines in charts for x in lines)
    window = max(
        _window(spec, len(_curve(run, spec, t.metric).steps)) for run in runs for t in logged
    )
    note = f"Thick lines: mean of the last {window} steps." if window > 1 else ""
    return Figure(spec.key, spec.section, spec.title, spec.caption, panels, tuple(entries), note)


def group_colors(runs: Sequence[Run]) -> dict[str, str]:
    """Label -> colour name, in order of first appearance; repeats after eight labels."""
    labels = list(dict.fromkeys(run.label for run in runs))
    return {label: GROUP_COLORS[i % len(GROUP_COLORS)] for i, label in enumerate(labels)}


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
    for label, color in group_colors(runs).items():
        members = [run for run in runs if run.label == label and _curve(run, spec, trace.metric)]
        if len(members) == 1:
            own = Trace(trace.metric, label, color)
            curve, stderr = (
                _curve(members[0], spec, trace.metric),
                _curve(members[0], spec, trace.stderr),
            )
            lines.append(_line(spec, own, curve, stderr))
        elif members:
            mean, low, high = mean_curve([_curve(run, spec, trace.metric) for run in members])
            if mean:
                lines.append(
                    _seeds(spec, f"{label} (mean of {len(members)})", color, mean, low, high)
                )
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

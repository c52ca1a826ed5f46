"""What a study's runs say: each arm beside the reference, and a sentence a claim.

    Cell, Run --arm_results--> ArmResult per task and arm --result_table--> header, rows
    Claim, Run --verdict-----> seen, opposite or undecided, per task

Seeds are the unit: differences are paired by them, with Student's t intervals at a confidence that
is corrected (Bonferroni) for the number of comparisons of a table. With few seeds they are wide,
and that is the point.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from igrpo_nemo.evaluation.statistics import t_quantile
from igrpo_nemo.report.runs import Run
from igrpo_nemo.report.tables import rollout_totals
from igrpo_nemo.study.grid import Claim

Runs = Mapping[str, Mapping[int, Run]]
"""The finished runs of one task: by arm and seed."""

ALIKE = 0.03
"""Two arms are alike where the whole interval of their difference lies within this of 0."""

UNITS = {"accuracy": (100.0, " points"), "entropy": (1.0, " nats"), "length": (1.0, " tokens")}
"""Of a claim's measure: the factor for display, and what is written behind."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its confidence interval; `low` and `high` are None for a single value."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def within(self, bound: float) -> bool:
        return (
            self.low is not None
            and self.high is not None
            and -bound < self.low <= self.high < bound
        )

    def text(self, factor: float = 100.0) -> str:
        """`-22.7 [-27.6, -17.7]`."""
        digits = 1 if factor == 100.0 else 3
        mean = f"{factor * self.mean:+.{digits}f}"
        if self.low is None or self.high is None:
            return mean
        return f"{mean} [{factor * self.low:+.{digits}f}, {factor * self.high:+.{digits}f}]"


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm of a task over its seeds. Accuracies are fractions, one value a seed.

    `difference` is the end accuracy minus the reference's, paired by the seeds both have; None for
    the reference itself. `gap` is the accuracy under q' minus the one under q at the end;
    `entropy`, `copy_rate` and `teaching` (groups with rewards that differ) are means over seeds of
    the last tenth of training; `completions` and `trained_rows` are per seed. None: not logged.
    """

    arm: str
    seeds: tuple[int, ...]
    start: tuple[float, ...]
    end: tuple[float, ...]
    difference: Interval | None
    gap: float | None
    completions: int | None
    trained_rows: int | None
    entropy: float | None
    copy_rate: float | None
    teaching: float | None
    seconds: float | None


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean and Student's t interval: mean +- t(n - 1) * s / sqrt(n)."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Interval(mean, None, None, n)
    half = t_quantile(0.5 + confidence / 2, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired_difference(
    ours: Mapping[int, float], reference: Mapping[int, float], confidence: float = 0.95
) -> Interval | None:
    """Interval of ours - reference over the seeds that both have; None without a common seed."""
    common = sorted(ours.keys() & reference.keys())
    if not common:
        return None
    return mean_interval([ours[seed] - reference[seed] for seed in common], confidence)


def corrected(confidence: float, comparisons: int) -> float:
    """The confidence of each of several intervals that hold together with `confidence`."""
    return 1 - (1 - confidence) / max(1, comparisons)


def arm_results(runs: Runs, reference: str, confidence: float = 0.95) -> list[ArmResult]:
    """One result an arm, in the mapping's order. Runs without validation are left out."""
    ends = {arm: _measured(by_seed, "accuracy") for arm, by_seed in runs.items()}
    confidence = corrected(confidence, len(runs) - 1)
    results = []
    for arm, by_seed in runs.items():
        seeds = tuple(sorted(ends[arm]))
        own = [by_seed[seed] for seed in seeds]
        totals = [rollout_totals(run) for run in own]
        difference = None
        if arm != reference and reference in ends:
            difference = paired_difference(ends[arm], ends[reference], confidence)
        gaps = [
            run.val["val/transfer_gap"].values[-1:] for run in own if "val/transfer_gap" in run.val
        ]
        results.append(
            ArmResult(
                arm=arm,
                seeds=seeds,
                start=tuple(s for run in own if (s := run.accuracy("start")) is not None),
                end=tuple(ends[arm][seed] for seed in seeds),
                difference=difference,
                gap=_mean([gap for (gap,) in gaps]),
                completions=totals[0]["completions sampled"] if totals else None,
                trained_rows=totals[0]["rows trained"] if totals else None,
                entropy=_mean([run.tail("entropy/exact") for run in own]),
                copy_rate=_mean([run.tail("igrpo/copy_rate") for run in own]),
                teaching=_mean([run.tail("igrpo/nonzero_advantage_groups") for run in own]),
                seconds=_mean([run.summary.get("seconds") for run in own]),
            )
        )
    return results


def result_table(
    results: Sequence[ArmResult], labels: Mapping[str, str], reference: str
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a task's arms, percentages as text; a dash where nothing was logged."""
    header = [
        "arm", "seeds", "start %", "end %", f"end - {labels[reference]}, points", "q' - q",
        "sampled", "trained", "entropy", "copies %", "teaching %",
    ]  # fmt: skip
    return header, [
        [
            labels[r.arm],
            str(len(r.seeds)),
            _spread(r.start),
            _spread(r.end),
            "reference" if r.arm == reference else r.difference.text() if r.difference else "–",
            "–" if r.gap is None else f"{100 * r.gap:+.1f}",
            _count(r.completions),
            _count(r.trained_rows),
            "–" if r.entropy is None else f"{r.entropy:.3f}",
            _percent(r.copy_rate),
            _percent(r.teaching),
        ]
        for r in results
    ]


def findings(results: Sequence[ArmResult], labels: Mapping[str, str], reference: str) -> list[str]:
    """What the intervals allow to say, one sentence an arm; who is ahead does not matter."""
    sentences = []
    for r in results:
        d = r.difference
        if r.arm == reference or d is None:
            continue
        arm, other = labels[r.arm], labels[reference]
        ahead, points = (arm if d.mean > 0 else other), f"{abs(100 * d.mean):.1f} points"
        if d.low is None:
            sentences.append(f"{arm}: {ahead} ahead by {points} on one seed, no interval.")
        elif d.excludes_zero:
            sentences.append(f"{arm}: {ahead} ahead by {points}, {d.text()} over seeds.")
        else:
            sentences.append(
                f"{arm}: no difference to {other} that {d.count} seeds can show ({d.text()})."
            )
    return sentences


def verdict(claim: Claim, runs: Runs, confidence: float) -> tuple[str, str]:
    """(`seen`, `not seen`, `the opposite` or `not decided`, the interval as text) for one task."""
    ours, theirs = (
        _measured(runs.get(arm, {}), claim.measure) for arm in (claim.arm, claim.against)
    )
    difference = paired_difference(ours, theirs, confidence)
    if difference is None:
        return "not run", "–"
    factor, unit = UNITS[claim.measure]
    text = difference.text(factor) + unit
    if claim.expects == "alike":
        known = "seen" if difference.within(ALIKE) else "not seen"
        return (known if difference.excludes_zero or known == "seen" else "not decided"), text
    if not difference.excludes_zero:
        return "not decided", text
    return (
        "seen" if (difference.mean > 0) == (claim.expects == "better") else "the opposite"
    ), text


def _measured(by_seed: Mapping[int, Run], measure: str) -> dict[int, float]:
    """A claim's measure of each seed that has it."""
    values = {
        "accuracy": lambda run: run.accuracy("end"),
        "entropy": lambda run: run.tail("entropy/exact"),
        "length": lambda run: run.tail("igrpo/refinement_tokens"),
    }[measure]
    return {seed: value for seed, run in by_seed.items() if (value := values(run)) is not None}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = f"{100 * statistics.fmean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"

"""Arms of an experiment against a reference arm, paired by seed.

    runs {arm: {seed: Run}} --arm_results--> ArmResult per arm --result_table--> header, rows
                                                               --findings--> sentences

Intervals are Student's t over seeds: with three of them they are wide, and that is the point.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from igrpo_nemo.evaluation.statistics import t_quantile
from igrpo_nemo.report.runs import Run
from igrpo_nemo.report.tables import rollout_totals


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


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm over its seeds. Accuracies are fractions, one value a seed, in the seeds' order.

    `difference` is the end accuracy minus the reference's, paired by the seeds both have; None for
    the reference itself. `entropy`, `copy_rate` and `nonzero_groups` are means over seeds of the
    last tenth of training, None where not logged; `completions` and `trained_rows` are per seed.
    """

    arm: str
    seeds: tuple[int, ...]
    start: tuple[float, ...]
    end: tuple[float, ...]
    difference: Interval | None
    completions: int | None
    trained_rows: int | None
    entropy: float | None
    copy_rate: float | None
    nonzero_groups: float | None
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


def arm_results(
    runs: Mapping[str, Mapping[int, Run]], reference: str, confidence: float = 0.95
) -> list[ArmResult]:
    """One result an arm, in the mapping's order. Runs without validation are left out."""
    ends = {
        arm: {
            seed: end for seed, run in by_seed.items() if (end := run.accuracy("end")) is not None
        }
        for arm, by_seed in runs.items()
    }
    results = []
    for arm, by_seed in runs.items():
        seeds = tuple(sorted(ends[arm]))
        own = [by_seed[seed] for seed in seeds]
        totals = [rollout_totals(run) for run in own]
        difference = None
        if arm != reference and reference in ends:
            difference = paired_difference(ends[arm], ends[reference], confidence)
        results.append(
            ArmResult(
                arm=arm,
                seeds=seeds,
                start=tuple(s for run in own if (s := run.accuracy("start")) is not None),
                end=tuple(ends[arm][seed] for seed in seeds),
                difference=difference,
                completions=totals[0]["completions sampled"] if totals else None,
                trained_rows=totals[0]["rows trained"] if totals else None,
                entropy=_mean([run.tail("entropy/exact") for run in own]),
                copy_rate=_mean([run.tail("igrpo/copy_rate") for run in own]),
                nonzero_groups=_mean([run.tail("igrpo/nonzero_advantage_groups") for run in own]),
                seconds=_mean([run.summary.get("seconds") for run in own]),
            )
        )
    return results


def result_table(results: Sequence[ArmResult], reference: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the comparison, percentages as text; a dash where nothing was logged."""
    header = [
        "arm", "seeds", "start %", "end %", f"end - {reference}, points", "sampled", "trained",
        "entropy", "copies %", "teaching %",
    ]  # fmt: skip
    return header, [
        [
            r.arm,
            str(len(r.seeds)),
            _spread(r.start),
            _spread(r.end),
            "reference" if r.arm == reference else _points(r.difference),
            _count(r.completions),
            _count(r.trained_rows),
            "–" if r.entropy is None else f"{r.entropy:.3f}",
            _percent(r.copy_rate),
            _percent(r.nonzero_groups),
        ]
        for r in results
    ]


def findings(results: Sequence[ArmResult], reference: str) -> list[str]:
    """What the intervals allow to say, one sentence an arm; who is ahead does not matter."""
    sentences = []
    for r in results:
        d = r.difference
        if r.arm == reference or d is None:
            continue
        ahead, points = (r.arm if d.mean > 0 else reference), f"{abs(100 * d.mean):.1f} points"
        if d.low is None or d.high is None:
            sentences.append(f"{r.arm}: {ahead} ahead by {points} on one seed, no interval.")
        elif d.excludes_zero:
            sentences.append(f"{r.arm}: {ahead} ahead by {points}, {_points(d)} over seeds.")
        else:
            sentences.append(
                f"{r.arm}: no difference to {reference} that {d.count} seeds can show "
                f"({_points(d)})."
            )
    return sentences


def _mean(values: Sequence[float | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = f"{100 * statistics.fmean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def _points(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    text = f"{100 * interval.mean:+.1f}"
    if interval.low is None or interval.high is None:
        return text
    return f"{text} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"

"""What a study's runs say: each arm beside the reference, and a sentence a claim.

    Run --arm_results--> ArmResult per task and arm --result_table--> a table
    Claim, Run --verdict--> seen, opposite or undecided, per task

Seeds are the unit: differences are paired by them, with Student's t intervals at a confidence that
is corrected (Bonferroni) for the number of comparisons of a table. With few seeds they are wide,
and that is the point.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from igrpo_nemo.evaluation.statistics import CONFIDENCE, Difference, over_seeds
from igrpo_nemo.evaluation.tables import Table, points
from igrpo_nemo.report.runs import Run
from igrpo_nemo.report.tables import rollout_totals
from igrpo_nemo.study.grid import Claim

Runs = Mapping[str, Mapping[int, Run]]
"""The finished runs of one task: by arm and seed."""

ALIKE = 0.03
"""Two arms are alike where the whole interval of their difference lies within this of 0."""


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm of a task over its seeds. Accuracies are fractions, one value a seed.

    `difference` is the end accuracy minus the reference's, paired by the seeds both have; None for
    the reference itself. `under_draft` is the accuracy under q' at the start and at the end,
    `first_gains` what the first validation after the start gained on q and under q';
    `entropy`, `copy_rate` and `teaching` (groups with rewards that differ) are means over seeds of
    the last tenth of training; `completions` and `trained_rows` are per seed. None: not logged.
    """

    arm: str
    seeds: tuple[int, ...]
    start: tuple[float, ...]
    end: tuple[float, ...]
    difference: Difference | None
    under_draft: tuple[float, float] | None
    first_gains: tuple[float, float] | None
    completions: float | None
    trained_rows: float | None
    entropy: float | None
    copy_rate: float | None
    teaching: float | None
    seconds: float | None


def paired_difference(
    ours: Mapping[int, float], reference: Mapping[int, float], confidence: float = CONFIDENCE
) -> Difference | None:
    """Ours - reference over the seeds that both have; None without a common seed."""
    common = sorted(ours.keys() & reference.keys())
    if not common:
        return None
    pairs = [ours[seed] - reference[seed] for seed in common]
    return over_seeds(pairs, confidence=confidence)


def corrected(confidence: float, comparisons: int) -> float:
    """The confidence of each of several intervals that hold together with `confidence`."""
    return 1 - (1 - confidence) / max(1, comparisons)


def arm_results(runs: Runs, reference: str) -> list[ArmResult]:
    """One result an arm, in the mapping's order. Runs without validation are left out."""
    ends = {arm: _measured(by_seed, "accuracy") for arm, by_seed in runs.items()}
    confidence = corrected(CONFIDENCE, len(runs) - 1)
    results = []
    for arm, by_seed in runs.items():
        seeds = tuple(sorted(ends[arm]))
        own = [by_seed[seed] for seed in seeds]
        totals = [rollout_totals(run) for run in own]
        difference = None
        if arm != reference and reference in ends:
            difference = paired_difference(ends[arm], ends[reference], confidence)
        bare, drafted = (_curves(own, f"val/{name}accuracy") for name in ("", "draft_conditioned_"))
        results.append(
            ArmResult(
                arm=arm,
                seeds=seeds,
                start=tuple(s for run in own if (s := run.accuracy("start")) is not None),
                end=tuple(ends[arm][seed] for seed in seeds),
                difference=difference,
                under_draft=_pair(_at(drafted, 0), _at(drafted, -1)),
                first_gains=_pair(_gain(bare), _gain(drafted)),
                completions=_mean([total["completions sampled"] for total in totals]),
                trained_rows=_mean([total["rows trained"] for total in totals]),
                entropy=_mean([run.tail("entropy/exact") for run in own]),
                copy_rate=_mean([run.tail("igrpo/copy_rate") for run in own]),
                teaching=_mean([run.tail("igrpo/nonzero_advantage_groups") for run in own]),
                seconds=_mean([run.summary.get("seconds") for run in own]),
            )
        )
    return results


def result_table(
    caption: str, results: Sequence[ArmResult], labels: Mapping[str, str], reference: str
) -> Table:
    """A task's arms, percentages as text; a dash where nothing was logged."""
    header = (
        "arm", "seeds", "start %", "end %", f"end - {labels[reference]}, points",
        "under a draft %", "first gains", "sampled", "trained", "entropy", "copies %", "teaching %",
    )  # fmt: skip
    rows = tuple(
        (
            labels[r.arm],
            str(len(r.seeds)),
            _spread(r.start),
            _spread(r.end),
            "reference" if r.arm == reference else points(r.difference) if r.difference else "–",
            _two(r.under_draft, "{:.1f} -> {:.1f}"),
            _two(r.first_gains, "{:+.1f} / {:+.1f}"),
            _count(r.completions),
            _count(r.trained_rows),
            "–" if r.entropy is None else f"{r.entropy:.3f}",
            _percent(r.copy_rate),
            _percent(r.teaching),
        )
        for r in results
    )
    return Table(caption, header, rows)


def findings(results: Sequence[ArmResult], labels: Mapping[str, str], reference: str) -> list[str]:
    """What the intervals allow to say, one sentence an arm; who is ahead does not matter."""
    sentences = []
    for r in results:
        d = r.difference
        if r.arm == reference or d is None:
            continue
        arm, other = labels[r.arm], labels[reference]
        ahead, by = (arm if d.mean > 0 else other), f"{abs(100 * d.mean):.1f} points"
        if d.low is None:
            sentences.append(f"{arm}: {ahead} ahead by {by} on one seed, no interval.")
        elif d.excludes_zero:
            sentences.append(f"{arm}: {ahead} ahead by {by}, {points(d)} over seeds.")
        else:
            sentences.append(
                f"{arm}: no difference to {other} that {d.problems} seeds can show ({points(d)})."
            )
    return sentences


def verdict(claim: Claim, runs: Runs, confidence: float) -> tuple[str, str]:
    """`seen`, `not seen`, `the opposite` or `not decided`, and the interval as text, for a task."""
    ours, theirs = (
        _measured(runs.get(arm, {}), claim.measure) for arm in (claim.arm, claim.against)
    )
    difference = paired_difference(ours, theirs, confidence)
    if difference is None:
        return "not run", "–"
    if claim.measure == "entropy":
        text = f"{points(difference, scale=1, digits=3)} nats"
    else:
        text = f"{points(difference)} points"
    if claim.expects == "alike" and _is_small(difference):
        return "seen", text
    if not difference.excludes_zero:
        return "not decided", text
    if claim.expects == "alike":
        return "not seen", text
    as_expected = (difference.mean > 0) == (claim.expects == "better")
    return "seen" if as_expected else "the opposite", text


def _is_small(difference: Difference) -> bool:
    low, high = difference.low, difference.high
    return low is not None and high is not None and -ALIKE < low <= high < ALIKE


def _measured(by_seed: Mapping[int, Run], measure: str) -> dict[int, float]:
    """A claim's measure of each seed that has it."""
    values = {
        seed: run.tail("entropy/exact") if measure == "entropy" else run.accuracy("end")
        for seed, run in by_seed.items()
    }
    return {seed: value for seed, value in values.items() if value is not None}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _curves(runs: Sequence[Run], name: str) -> list[Sequence[float]]:
    """A validation metric's values of the runs that logged it."""
    return [curve.values for run in runs if (curve := run.val.get(name))]


def _at(curves: Sequence[Sequence[float]], place: int) -> float | None:
    return _mean([values[place] for values in curves])


def _gain(curves: Sequence[Sequence[float]]) -> float | None:
    return _mean([values[1] - values[0] for values in curves if len(values) > 1])


def _pair(first: float | None, second: float | None) -> tuple[float, float] | None:
    return None if first is None or second is None else (first, second)


def _two(shares: tuple[float, float] | None, form: str) -> str:
    return "–" if shares is None else form.format(*(100 * share for share in shares))


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = f"{100 * statistics.fmean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"

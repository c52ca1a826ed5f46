"""A comparison of evaluations as tables of text, as findings, and as rows for a CSV file.

Accuracies are percentages with one standard error; which one stands in the caption.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from igrpo_nemo.evaluation.results import BenchmarkResults
from igrpo_nemo.evaluation.statistics import CONFIDENCE, Difference, Estimate, over_seeds
from igrpo_nemo.evaluation.systems import AVERAGE, SETTINGS, Comparison, System

CSV_HEADER = (
    "system", "benchmark", "quantity", "k", "value", "stderr_problems", "stderr_sampling",
    "low", "high", "problems", "samples",
)  # fmt: skip
"""`value` is a fraction (tokens: a count); the row of a difference is system minus reference."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text; the first column names the row."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(comparison: Comparison, *, details: bool = True) -> list[Table]:
    """Accuracy beside published, differences to the reference, details, and what differs."""
    return [
        accuracy_table(comparison),
        *([difference_table(comparison)] if comparison.differences else []),
        *([seeds_table(comparison)] if comparison.arms else []),
        *([detail_table(comparison)] if details else []),
        *([settings_table(comparison)] if comparison.differing else []),
    ]


def accuracy_table(comparison: Comparison) -> Table:
    """A row a system, its published figures below it; a column a benchmark and the average."""
    names = comparison.benchmarks
    rows = []
    for system in comparison.systems:
        cells = [_percent(system.benchmarks[name].accuracy) for name in names]
        rows.append((system.label, *cells, _percent(system.average(names))))
        if system.label in comparison.published:
            rows += _published_rows(comparison, system)
    header = ("system", *names, AVERAGE)
    if len(names) == 1:  # it would be the average too
        header, rows = header[:-1], [row[:-1] for row in rows]
    caption = (
        "Accuracy in %: mean over samples ± standard error over problems (of the average: over the "
        "problems of every benchmark). Published figures as printed, in points where subtracted."
    )
    return Table(caption, header, tuple(rows))


def _published_rows(comparison: Comparison, system: System) -> list[tuple[str, ...]]:
    names, published = comparison.benchmarks, comparison.published[system.label]
    complete = set(published.benchmarks) == set(names)
    average, recomputed = published.average, published.recomputed
    printed = [published.benchmarks.get(name) for name in names]
    cells = ["–" if value is None else f"{100 * value:.2f}" for value in printed]
    average_cell = "–" if average is None or not complete else f"{100 * average:.2f}"
    if complete and average and recomputed and abs(average - recomputed) > 1.5e-4:
        average_cell += f" (columns: {100 * recomputed:.2f})"
    measured = [system.benchmarks[name].accuracy.mean for name in names]
    gaps = [
        "–" if theirs is None else f"{100 * (ours - theirs):+.1f}"
        for ours, theirs in zip(
            [*measured, system.average(names).mean],
            [*printed, recomputed if complete else None],
            strict=True,
        )
    ]
    return [
        (f"{system.label}, published", *cells, average_cell),
        (f"{system.label}, measured - published", *gaps),
    ]


def difference_table(comparison: Comparison) -> Table:
    """Every system minus the reference, paired by problem, in points."""
    reference = comparison.reference.label
    rows = tuple(
        (label, name, str(d.problems), points(d), _number(sampling_error(comparison, label, name)))
        for label, by_name in comparison.differences.items()
        for name, d in by_name.items()
    )
    caption = (
        f"Difference to {reference} in points, paired by problem, with its {100 * CONFIDENCE:g} % "
        "bootstrap interval over problems; ± sampling: one standard error with these problems "
        "fixed. Intervals are not corrected for the number of comparisons."
    )
    header = ("system", "benchmark", "problems", f"minus {reference}", "± sampling")
    return Table(caption, header, rows)


def sampling_error(comparison: Comparison, label: str, name: str) -> float | None:
    """Standard error of a difference with the problems fixed: samples of two systems are
    independent of each other. None where it is unknown, or where the problems differ."""
    ours = next(system for system in comparison.systems if system.label == label)
    names = comparison.benchmarks if name == AVERAGE else (name,)
    if any(each.name.startswith("problems of ") for each in comparison.differing):
        return None
    errors = [system.average(names).sampling for system in (ours, comparison.reference)]
    known = [error for error in errors if error is not None]
    return math.hypot(*known) if len(known) == 2 else None


def seeds_table(comparison: Comparison) -> Table:
    """A row per arm and benchmark: the spread over its training seeds, and the difference to the
    first arm."""
    first = next(iter(comparison.arms))
    rows = tuple(
        (arm, name, str(mean.problems), points(mean)[1:], _number(spread), points(difference))
        for arm, name, mean, spread, difference in _over_seeds(comparison)
    )
    header = ("arm", "benchmark", "seeds", "accuracy %", "spread", f"minus {first}")
    caption = (
        f"Over training seeds: mean with Student's {100 * CONFIDENCE:g} % interval over seeds, "
        "standard deviation of a seed, difference with Welch's interval."
    )
    return Table(caption, header, rows)


def _over_seeds(
    comparison: Comparison,
) -> Iterator[tuple[str, str, Difference, float | None, Difference]]:
    """Arm, benchmark or `AVERAGE`, its mean, its deviation over seeds, minus the first arm."""
    names = [*comparison.benchmarks, *([AVERAGE] if comparison.benchmarks[1:] else [])]
    for name in names:
        of = comparison.benchmarks if name == AVERAGE else (name,)
        means = {
            arm: [system.average(of).mean for system in seeds]
            for arm, seeds in comparison.arms.items()
        }
        first = next(iter(means.values()))
        for arm, means_S in means.items():
            spread = float(np.std(means_S, ddof=1)) if len(means_S) > 1 else None
            yield arm, name, over_seeds(means_S), spread, over_seeds(means_S, first)


def detail_table(comparison: Comparison) -> Table:
    """A row per system and benchmark: both errors, votes, missing answers, tokens."""
    rows = tuple(
        _detail_row(system.label, found)
        for system in comparison.systems
        for found in system.measured.values()
    )
    header = (
        "system", "benchmark", "P × K", "accuracy %", "± problems", "± sampling", "Bayes@K %",
        "majority %", "pass@K %", "no answer %", "cut off %", "tokens",
    )  # fmt: skip
    caption = (
        "Details: P problems, K samples each. ± problems: other problems and other samples; "
        "± sampling: these problems, other samples. Bayes@K: posterior mean ± its deviation. "
        "Majority and pass@K take all K samples. Cut off: replies at the token limit."
    )
    return Table(caption, header, rows)


def _detail_row(label: str, one: BenchmarkResults) -> tuple[str, ...]:
    tokens = "–"
    if one.tokens is not None:
        error = one.tokens.problems
        tokens = f"{one.tokens.mean:,.0f}" + ("" if error is None else f" ± {error:,.0f}")
    return (
        label,
        one.benchmark,
        f"{len(one.problems):,} × {one.num_samples}",
        _number(one.accuracy.mean),
        _number(one.accuracy.problems),
        _number(one.accuracy.sampling),
        f"{_number(one.bayes.mean)} ± {_number(one.bayes.sampling)}",
        _percent(one.majority) if one.majority else "–",
        _percent(one.passes[one.num_samples]),
        _number(one.no_answer.mean),
        _number(one.truncated.mean),
        tokens,
    )


def settings_table(comparison: Comparison) -> Table:
    labels = [system.label for system in comparison.systems]
    rows = tuple(
        (each.name, *(each.values.get(label, "–") for label in labels))
        for each in comparison.differing
    )
    return Table("The evaluations differ in these settings", ("setting", *labels), rows)


def findings(comparison: Comparison) -> list[str]:
    """What the intervals allow to say, a sentence a system; who is ahead does not matter."""
    first, reference = comparison.benchmarks[0], comparison.reference.label
    sentences = []
    for label, by_name in comparison.differences.items():
        where = "on average" if AVERAGE in by_name else f"on {first}"
        d = by_name.get(AVERAGE) or by_name[first]
        ahead, behind = (label, reference) if d.mean > 0 else (reference, label)
        lead = f"{ahead} is ahead of {behind} by {abs(100 * d.mean):.1f} points {where}"
        if d.low is None or d.high is None:
            sentences.append(f"{lead}; one problem gives no interval.")
        elif d.excludes_zero:
            low, high = sorted(abs(100 * end) for end in (d.low, d.high))
            sentences.append(f"{lead} ({low:.1f} to {high:.1f}).")
        else:
            none = f"{label} and {reference}: no difference {where} that these problems can show"
            sentences.append(f"{none} ({points(d)}).")
    return sentences


def common_setting(comparison: Comparison) -> str:
    """How all systems were measured, as a sentence; what differs has a table of its own."""
    first = comparison.reference.setting
    apart = {each.name for each in comparison.differing} | {"system_prompt"}
    known = [f"{name} {first[name]}" for name in SETTINGS if name in first and name not in apart]
    return f"All: {', '.join(known)}." if known else ""


def points(difference: Difference, scale: float = 100.0, digits: int = 1) -> str:
    """`+1.2 [+0.3, +2.1]` in percentage points; the mean alone where there is no interval."""
    text = f"{scale * difference.mean:+.{digits}f}"
    if difference.low is None or difference.high is None:
        return text
    return f"{text} [{scale * difference.low:+.{digits}f}, {scale * difference.high:+.{digits}f}]"


def summary(comparison: Comparison) -> str:
    """What a terminal shows: the tables without the details, and the findings."""
    shown = tables(comparison, details=False)
    blocks = ["\n".join([*aligned(table), table.caption]) for table in shown]
    if sentences := findings(comparison):
        blocks.append("\n".join(f"- {sentence}" for sentence in sentences))
    return "\n\n".join(blocks)


def title_of(comparison: Comparison) -> str:
    return f"Evaluation of {', '.join(system.label for system in comparison.systems)}"


def as_markdown(comparison: Comparison) -> str:
    setting = common_setting(comparison)
    parts = [f"# {title_of(comparison)}", *(["", setting, ""] if setting else [""])]
    parts += [f"- {sentence}" for sentence in findings(comparison)]
    for table in tables(comparison):
        parts += ["", table.caption, "", *aligned(table)]
    sources = dict.fromkeys(
        f"{p.experiment}: {p.source}" for p in comparison.published.values() if p.source
    )
    if sources:
        parts += ["", "Published figures:", *(f"- {source}" for source in sources)]
    return "\n".join(parts) + "\n"


def aligned(table: Table) -> list[str]:
    """A table in Markdown, its columns aligned: the first one left, the others right."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in [table.header, *table.rows]]
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * first, *("-" * (width - 1) + ":" for width in others)])
    return [
        f"| {' | '.join([row[0].ljust(first), *map(str.rjust, row[1:], others)])} |" for row in rows
    ]


def as_csv(comparison: Comparison) -> str:
    """Every number of the comparison, one a row; the columns are `CSV_HEADER`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for row in _csv_rows(comparison):
        writer.writerow(["" if value is None else value for value in row])
    return text.getvalue()


def _csv_rows(comparison: Comparison) -> Iterator[tuple[str | int | float | None, ...]]:
    for system in comparison.systems:
        for name, one in system.measured.items():
            K = one.num_samples
            quantities: list[tuple[str, int | None, Estimate | None]] = [
                ("accuracy", None, one.accuracy),
                ("bayes", K, one.bayes),
                ("majority", K, one.majority),
                ("no_answer", None, one.no_answer),
                ("truncated", None, one.truncated),
                ("tokens", None, one.tokens),
                *(("pass", k, found) for k, found in one.passes.items()),
            ]
            for quantity, k, e in quantities:
                if e is not None:
                    numbers = (e.mean, e.problems, e.sampling, None, None, len(one.problems), K)
                    yield (system.label, name, quantity, k, *numbers)
        average = system.average(comparison.benchmarks)
        numbers = (average.mean, average.problems, average.sampling)
        yield (system.label, AVERAGE, "accuracy", None, *numbers, *[None] * 4)
    for label, by_name in comparison.differences.items():
        for name, d in by_name.items():
            errors = (d.mean, d.stderr, sampling_error(comparison, label, name), d.low, d.high)
            yield (label, name, "difference", None, *errors, d.problems, None)
    for arm, name, mean, spread, _ in _over_seeds(comparison) if comparison.arms else ():
        interval = (mean.mean, None, None, mean.low, mean.high)
        yield (arm, name, "seeds_mean", None, *interval, None, None)
        yield (arm, name, "seeds_spread", None, spread, *[None] * 6)
    for label, published in comparison.published.items():
        for name, value in {**published.benchmarks, AVERAGE: published.average}.items():
            yield (label, name, "published", None, value, *[None] * 6)


def _percent(estimate: Estimate) -> str:
    error = "" if estimate.problems is None else f" ± {100 * estimate.problems:.1f}"
    return f"{100 * estimate.mean:.1f}{error}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"

"""A comparison of evaluations as tables of text, as findings, and as rows for a CSV file.

Accuracies are percentages with one standard error; which one stands in the caption.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from igrpo_nemo.evaluation.published import Published
from igrpo_nemo.evaluation.results import BenchmarkResults
from igrpo_nemo.evaluation.statistics import Difference, Estimate
from igrpo_nemo.evaluation.systems import AVERAGE, SETTINGS, Comparison, System


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text; the first column names the row."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


CSV_HEADER = (
    "system", "benchmark", "quantity", "k", "value", "stderr_problems", "stderr_sampling",
    "low", "high", "problems", "samples",
)  # fmt: skip
"""`value` is a fraction (tokens: a count); the row of a difference is system minus reference."""


def tables(comparison: Comparison) -> list[Table]:
    """Accuracy beside published, differences to the reference, details, and what differs."""
    found = [accuracy_table(comparison)]
    if comparison.differences:
        found.append(difference_table(comparison))
    found.append(detail_table(comparison))
    if comparison.differing:
        found.append(settings_table(comparison))
    return found


def accuracy_table(comparison: Comparison) -> Table:
    """A row a system, its published figures below it; a column a benchmark and the average."""
    names = comparison.benchmarks
    rows = []
    for system in comparison.systems:
        cells = [_percent(system.benchmarks[name].accuracy) for name in names]
        rows.append((system.label, *cells, _percent(system.average(names))))
        if published := comparison.published.get(system.label):
            rows += _published_rows(system, published, names)
    header = ("system", *names, AVERAGE)
    if len(names) == 1:  # it would be the average too
        header, rows = header[:-1], [row[:-1] for row in rows]
    caption = (
        "Accuracy in %: mean over samples ± standard error over problems (of the average: over the "
        "problems of every benchmark). Published figures as printed, in points where subtracted."
    )
    return Table(caption, header, tuple(rows))


def difference_table(comparison: Comparison) -> Table:
    """Every system minus the reference, paired by problem, in points."""
    reference = comparison.reference.label
    rows = []
    for label, by_name in comparison.differences.items():
        for name, difference in by_name.items():
            error = sampling_error(comparison, label, name)
            cells = (str(difference.problems), points(difference), _number(error))
            rows.append((label, name, *cells))
    percent = f"{100 * comparison.confidence:g} %"
    caption = (
        f"Difference to {reference} in points, paired by problem, with its {percent} bootstrap "
        "interval over problems; ± sampling: one standard error with these problems fixed. "
        "Intervals are not corrected for the number of comparisons."
    )
    header = ("system", "benchmark", "problems", f"minus {reference}", "± sampling")
    return Table(caption, header, tuple(rows))


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


def detail_table(comparison: Comparison) -> Table:
    """A row per system and benchmark: both errors, votes, missing answers, tokens."""
    rows = tuple(
        _detail_row(system.label, summary)
        for system in comparison.systems
        for summary in system.benchmarks.values()
    )
    header = (
        "system", "benchmark", "P × K", "accuracy %", "± problems", "± sampling", "majority %",
        "pass@K %", "no answer %", "cut off %", "tokens",
    )  # fmt: skip
    caption = (
        "Details: P problems, K samples each. ± problems: other problems and other samples; "
        "± sampling: these problems, other samples. Majority and pass@K take all K samples. "
        "Cut off: replies at the token limit."
    )
    return Table(caption, header, rows)


def settings_table(comparison: Comparison) -> Table:
    """What was not the same in all evaluations."""
    labels = [system.label for system in comparison.systems]
    rows = tuple(
        (each.name, *(each.values.get(label, "–") for label in labels))
        for each in comparison.differing
    )
    return Table("The evaluations differ in these settings", ("setting", *labels), rows)


def findings(comparison: Comparison) -> list[str]:
    """What the intervals allow to say, a sentence a system; who is ahead does not matter."""
    reference = comparison.reference.label
    sentences = []
    for label, by_name in comparison.differences.items():
        where = "on average" if AVERAGE in by_name else f"on {comparison.benchmarks[0]}"
        difference = by_name.get(AVERAGE) or by_name[comparison.benchmarks[0]]
        ahead, behind = (label, reference) if difference.mean > 0 else (reference, label)
        lead = f"{ahead} is ahead of {behind} by {abs(100 * difference.mean):.1f} points {where}"
        if difference.low is None or difference.high is None:
            sentences.append(f"{lead}; one problem gives no interval.")
        elif difference.excludes_zero:
            ends = sorted(abs(100 * end) for end in (difference.low, difference.high))
            sentences.append(f"{lead} ({ends[0]:.1f} to {ends[1]:.1f}).")
        else:
            sentences.append(
                f"{label} and {reference}: no difference {where} that these problems can show "
                f"({points(difference)})."
            )
    return sentences


def common_setting(comparison: Comparison) -> str:
    """How all systems were measured, as a sentence; what differs has a table of its own."""
    first = comparison.reference.setting
    apart = {each.name for each in comparison.differing} | {"system_prompt"}
    known = [f"{name} {first[name]}" for name in SETTINGS if name in first and name not in apart]
    return f"All: {', '.join(known)}." if known else ""


def points(difference: Difference) -> str:
    """`+1.2 [+0.3, +2.1]` in percentage points; the mean alone where there is no interval."""
    text = f"{100 * difference.mean:+.1f}"
    if difference.low is None or difference.high is None:
        return text
    return f"{text} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def as_markdown(comparison: Comparison, title: str) -> str:
    """All tables and findings as a Markdown page."""
    setting = common_setting(comparison)
    parts = [f"# {title}", *(["", setting, ""] if setting else [""])]
    parts += [f"- {sentence}" for sentence in findings(comparison)]
    for table in tables(comparison):
        parts += ["", table.caption, "", *_markdown_rows(table)]
    sources = dict.fromkeys(
        f"{p.experiment}: {p.source}" for p in comparison.published.values() if p.source
    )
    if sources:
        parts += ["", "Published figures:", *(f"- {source}" for source in sources)]
    return "\n".join(parts) + "\n"


def as_csv(comparison: Comparison) -> str:
    """Every number of the comparison, one a row; the columns are `CSV_HEADER`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for row in csv_rows(comparison):
        writer.writerow(["" if value is None else value for value in row])
    return text.getvalue()


def csv_rows(comparison: Comparison) -> Iterator[tuple[str | int | float | None, ...]]:
    """Rows under `CSV_HEADER`; what is unknown is None."""
    for system in comparison.systems:
        for name, summary in system.benchmarks.items():
            yield from _summary_rows(system.label, name, summary)
        average = system.average(comparison.benchmarks)
        yield _estimate_row(system.label, AVERAGE, "accuracy", None, average, None, None)
    for label, by_name in comparison.differences.items():
        for name, d in by_name.items():
            errors = (d.mean, d.stderr, sampling_error(comparison, label, name), d.low, d.high)
            yield (label, name, "difference", None, *errors, d.problems, None)
    for label, published in comparison.published.items():
        values = {**published.benchmarks, AVERAGE: published.average}
        for name, value in values.items():
            yield (label, name, "published", None, value, *[None] * 6)


def _published_rows(
    system: System, published: Published, names: Sequence[str]
) -> list[tuple[str, ...]]:
    complete = set(published.benchmarks) == set(names)
    average = published.average if complete else None
    printed = [published.benchmarks.get(name) for name in names]
    measured = [system.benchmarks[name].accuracy.mean for name in names]
    shown = [*printed, average]
    gaps = [None if p is None else m - p for m, p in zip(measured, printed, strict=True)]
    recomputed = published.recomputed if complete else None
    gap = None if recomputed is None else system.average(names).mean - recomputed
    average_text = "–" if average is None else f"{100 * average:.2f}"
    if average is not None and recomputed is not None and abs(average - recomputed) > 1.5e-4:
        average_text += f" (columns: {100 * recomputed:.2f})"
    cells = ["–" if value is None else f"{100 * value:.2f}" for value in shown[:-1]]
    differences = ["–" if value is None else f"{100 * value:+.1f}" for value in [*gaps, gap]]
    return [
        (f"{system.label}, published", *cells, average_text),
        (f"{system.label}, measured - published", *differences),
    ]


def _detail_row(label: str, s: BenchmarkResults) -> tuple[str, ...]:
    last = max(s.passes)
    tokens = "–"
    if s.tokens is not None:
        tokens = f"{s.tokens.mean:,.0f}" + _error(s.tokens.problems, 1, ",.0f")
    return (
        label,
        s.benchmark,
        f"{len(s.problems):,} × {s.num_samples}",
        f"{100 * s.accuracy.mean:.1f}",
        _number(s.accuracy.problems),
        _number(s.accuracy.sampling),
        _percent(s.majority) if s.majority else "–",
        _percent(s.passes[last]),
        f"{100 * s.no_answer.mean:.1f}",
        f"{100 * s.truncated.mean:.1f}",
        tokens,
    )


def _summary_rows(label: str, name: str, s: BenchmarkResults) -> Iterator[tuple]:
    sizes = (len(s.problems), s.num_samples)
    single = {"accuracy": s.accuracy, "majority": s.majority, "no_answer": s.no_answer}
    for quantity, found in {**single, "truncated": s.truncated, "tokens": s.tokens}.items():
        if found is not None:
            k = s.num_samples if quantity == "majority" else None
            yield _estimate_row(label, name, quantity, k, found, *sizes)
    for k, found in s.passes.items():
        yield _estimate_row(label, name, "pass", k, found, *sizes)


def _estimate_row(label: str, name: str, quantity: str, k, e: Estimate, problems, samples) -> tuple:
    return (label, name, quantity, k, e.mean, e.problems, e.sampling, None, None, problems, samples)


def _markdown_rows(table: Table) -> Iterator[str]:
    yield _markdown_row(table.header)
    yield _markdown_row(["---"] * len(table.header))
    for row in table.rows:
        yield _markdown_row(row)


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.1f}{_error(estimate.problems)}"


def _error(value: float | None, scale: float = 100, form: str = ".1f") -> str:
    return "" if value is None else f" ± {scale * value:{form}}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"

"""`igrpo data inspect NAME`: what a data set holds and what of it can be used, as a table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from igrpo_nemo.cli.command import Command, at_least
from igrpo_nemo.data import DataReport, DataSpec, load_with_report
from igrpo_nemo.errors import UserError
from igrpo_nemo.types import Problem

EXAMPLES = """\
  igrpo data inspect math
  igrpo data inspect my.jsonl --input-key problem --output-key answer --tokenizer PATH
"""

_SAMPLE_CHARS = 160
_QUANTILES = (("min", 0.0), ("median", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1.0))


@dataclass(frozen=True, slots=True)
class Inspection:
    """A data set's report, its questions' lengths, and three of its problems.

    `lengths` are tokens of the tokenizer `unit` names, else characters.
    """

    report: DataReport
    unit: str
    lengths: Mapping[str, int]
    samples: tuple[Problem, ...]


def inspect(spec: DataSpec, tokenizer: str | None = None) -> Inspection:
    """Load a data set and describe it. Raises UserError as `load_with_report` does."""
    problems, report = load_with_report(spec, overlap=True)
    questions = [problem.question for problem in problems]
    lengths = _token_lengths(questions, tokenizer) if tokenizer else list(map(len, questions))
    step = max(1, len(problems) // 3)
    return Inspection(
        report=report,
        unit=f"tokens of {tokenizer}" if tokenizer else "characters",
        lengths=quantiles(lengths),
        samples=tuple(problems[::step][:3]),
    )


def quantiles(values: Sequence[int]) -> dict[str, int]:
    """Minimum, median, 95th, 99th percentile and maximum (nearest rank)."""
    ordered = sorted(values)
    return {name: ordered[round(q * (len(ordered) - 1))] for name, q in _QUANTILES}


def _token_lengths(questions: Sequence[str], tokenizer: str) -> list[int]:
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot load the tokenizer {tokenizer}: {reason}") from None
    ids = loaded(list(questions), add_special_tokens=False)["input_ids"]
    return [len(row) for row in ids]


def render(inspection: Inspection) -> str:
    """The inspection as plain text."""
    report = inspection.report
    lines = [f"{report.name}  ({report.source})", ""]
    lines += _table([("rows", report.rows), ("kept", report.kept)])
    lines += _table([(f"dropped: {reason}", n) for reason, n in report.dropped.items()])
    lines += [
        f"    {reason}: rows {', '.join(map(str, rows))}{' ...' if _more(report, reason) else ''}"
        for reason, rows in report.dropped_rows.items()
    ]
    lines += _table([("repeated questions", report.duplicates)])
    lines += _table(
        [
            (f"shared with {name}", "not at hand" if n is None and name != report.name else n)
            for name, n in report.overlap.items()
            if name != report.name
        ]
    )
    lines += ["", f"  question length ({inspection.unit})"]
    lines += _table(list(inspection.lengths.items()))
    for problem in inspection.samples:
        lines += ["", f"  {problem.id}", f"    Q: {_short(problem.question)}"]
        lines += [f"    A: {_short(problem.answer)}"]
    return "\n".join(lines)


def _more(report: DataReport, reason: str) -> bool:
    return report.dropped[reason] > len(report.dropped_rows[reason])


def _table(rows: Sequence[tuple[str, object]]) -> list[str]:
    return [f"  {name:<36}{value!s:>12}" for name, value in rows]


def _short(text: str) -> str:
    """One printable line: text of a data set must not steer the terminal."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return line if len(line) <= _SAMPLE_CHARS else f"{line[: _SAMPLE_CHARS - 3]}..."


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `igrpo data inspect`."""
    parser.add_argument("--data-path", help="a file or folder, with NAME giving the columns")
    parser.add_argument("--split", help="split (default: the set's first)")
    parser.add_argument("--subset", help="configuration of a hub data set")
    parser.add_argument("--input-key", help="column of the question")
    parser.add_argument("--output-key", help="column of the answer or solution")
    parser.add_argument(
        "--subset-size", type=at_least(1), help="take that many usable problems (num_problems)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the subset")
    parser.add_argument("--drop-duplicates", action="store_true", help="drop repeated questions")
    parser.add_argument(
        "--drop-overlap", action="store_true", help="drop questions of the evaluation sets"
    )
    parser.add_argument("--tokenizer", help="folder or hub id; lengths are then in tokens")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(flags: argparse.Namespace, words: Sequence[str]) -> int:
    """`igrpo data inspect NAME`: prints the table and returns 0."""
    if len(words) != 2 or words[0] != "inspect":
        raise UserError("igrpo data inspect NAME: give one name, file or hub id")
    spec = DataSpec(
        dataset_name=words[1],
        data_path=flags.data_path,
        input_key=flags.input_key,
        output_key=flags.output_key,
        subset=flags.subset,
        split=flags.split,
        num_problems=flags.subset_size,
        seed=flags.seed,
        drop_duplicates=flags.drop_duplicates,
        drop_overlap=flags.drop_overlap,
    )
    inspection = inspect(spec, flags.tokenizer)
    print(json.dumps(asdict(inspection)) if flags.json else render(inspection))
    return 0


COMMAND = Command(
    name="data",
    help="describe a data set: drops, lengths, overlap",
    usage="inspect NAME [--split SPLIT] [--tokenizer PATH] [--json] ...",
    examples=EXAMPLES,
    add_flags=add_flags,
    run=run,
)

"""`igrpo data inspect NAME`: what a data set holds and what of it can be used, as a table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from igrpo_nemo.cli.command import Command, switch
from igrpo_nemo.data import DataSpec, load_with_report
from igrpo_nemo.errors import UserError
from igrpo_nemo.files.display_text import shorten

EXAMPLES = """\
  igrpo data inspect math
  igrpo data inspect my.jsonl --input-key problem --output-key answer --tokenizer PATH
"""

_SAMPLE_CHARS = 160
_QUANTILES = (("min", 0.0), ("median", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1.0))


def inspect(spec: DataSpec, tokenizer: str | None = None) -> dict[str, Any]:
    """A data set's report, its questions' lengths, and three of its problems.

    `lengths` are tokens of the tokenizer that `unit` names, else characters. Raises UserError as
    `load_with_report` does.
    """
    problems, report = load_with_report(spec, overlap=True)
    questions = [problem.question for problem in problems]
    lengths = _token_lengths(questions, tokenizer) if tokenizer else list(map(len, questions))
    return {
        "report": asdict(report),
        "unit": f"tokens of {tokenizer}" if tokenizer else "characters",
        "lengths": quantiles(lengths),
        "samples": [asdict(problem) for problem in problems[:: max(1, len(problems) // 3)][:3]],
    }


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


def render(inspection: Mapping[str, Any]) -> str:
    report = inspection["report"]
    name, dropped = report["name"], report["dropped"]
    lines = [f"{name}  ({report['source']})", ""]
    lines += _table([("rows", report["rows"]), ("kept", report["kept"])])
    lines += _table([(f"dropped: {reason}", n) for reason, n in dropped.items()])
    lines += [
        f"    {reason}: rows {', '.join(map(str, rows))}{' ...' * (dropped[reason] > len(rows))}"
        for reason, rows in report["dropped_rows"].items()
    ]
    lines += _table([("repeated questions", report["duplicates"])])
    shared = {other: n for other, n in report["overlap"].items() if other != name}
    told = (
        (f"shared with {other}", "not at hand" if n is None else n) for other, n in shared.items()
    )
    lines += [*_table(list(told)), "", f"  question length ({inspection['unit']})"]
    lines += _table(list(inspection["lengths"].items()))
    for problem in inspection["samples"]:
        question, answer = (shorten(problem[key], _SAMPLE_CHARS) for key in ("question", "answer"))
        lines += ["", f"  {problem['id']}", f"    Q: {question}", f"    A: {answer}"]
    return "\n".join(lines)


def _table(rows: Sequence[tuple[str, object]]) -> list[str]:
    return [f"  {name:<36}{value!s:>12}" for name, value in rows]


def run(flags: argparse.Namespace, words: Sequence[str]) -> int:
    if len(words) != 2 or words[0] != "inspect":
        raise UserError("igrpo data inspect NAME: give one name, file or hub id")
    chosen = ("data_path", "input_key", "output_key", "subset", "split")
    spec = DataSpec(words[1], **{name: getattr(flags, name) for name in chosen})
    inspection = inspect(spec, flags.tokenizer)
    print(json.dumps(inspection) if flags.json else render(inspection))
    return 0


COMMAND = Command(
    name="data",
    help="describe a data set: drops, lengths, overlap",
    words="inspect NAME",
    run=run,
    flags={
        "--data-path": {"help": "a file or folder, with NAME giving the columns"},
        "--split": {"help": "split (default: the set's first)"},
        "--subset": {"help": "configuration of a hub data set"},
        "--input-key": {"help": "column of the question"},
        "--output-key": {"help": "column of the answer or solution"},
        "--tokenizer": {"help": "folder or hub id; lengths are then in tokens"},
        "--json": switch("print one JSON object"),
    },
    examples=EXAMPLES,
)

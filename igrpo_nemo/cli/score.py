"""`igrpo score FILE.jsonl`: verdicts on a file of completions.

    rows (answer, completion or list of completions) --pool--> FILE.verdicts.jsonl + a summary

A verdict line is `{"row", "sample", "correct", "reason"}`, counted from 0; the last line printed is
`{"accuracy": 0..1, "n": ..., "reasons": {...}}`. A row without a reference has the reason
`no_reference`: it is in the file, and in neither `accuracy` nor `n`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from igrpo_nemo.api import LONGEST_ITEM_S, Scores, score, texts_of_row
from igrpo_nemo.cli.command import Command, at_least, switch
from igrpo_nemo.data.rows import Row, read_file
from igrpo_nemo.errors import UserError
from igrpo_nemo.files.atomic import check_folder, write_or_refuse
from igrpo_nemo.rewards.extract import AnswerFormat

EXAMPLES = """\
  igrpo score samples.jsonl --answer-key answer --completion-key completions
  igrpo score samples.jsonl --answer-key gold --completion-key text --answer-format boxed
"""


def score_file(path: Path, *, answer_key: str, completion_key: str, **settings: Any) -> Scores:
    """Scores every completion of a file (JSONL, JSON, Parquet or CSV) as `igrpo_nemo.score` does
    with these `settings`.

    `completion_key` may hold a text or a list of texts. Raises UserError for a missing column or a
    completion that is not text, naming file and row.
    """
    references: list[Any] = []
    completions: list[list[str]] = []
    columns: list[Row] = []
    for number, row in enumerate(read_file(path)):
        where = f"{path}, row {number}"
        references.append(_field(row, answer_key, where))
        completions.append(texts_of_row(_field(row, completion_key, where), where))
        columns.append({key: row[key] for key in row if key not in (answer_key, completion_key)})
    return score(references, completions, columns=columns, **settings)


def lines(scores: Scores) -> Iterator[str]:
    """The file of verdicts."""
    rewards = scores.rewards or [{}] * len(scores.places)
    for (row, sample), verdict, own in zip(scores.places, scores.verdicts, rewards, strict=True):
        told = {"correct": verdict.correct, "reason": str(verdict.reason)}
        told |= {"rewards": own} if own else {}
        yield json.dumps({"row": row, "sample": sample, **told}) + "\n"


def _field(row: Row, key: str, where: str) -> Any:
    if key not in row:
        raise UserError(f"{where}: no column {key!r}: the columns are {', '.join(map(str, row))}")
    return row[key]


def run(flags: argparse.Namespace, words: Sequence[str]) -> int:
    if len(words) != 1:
        raise UserError("igrpo score FILE: give one file of completions")
    path = Path(words[0])
    out = flags.out or path.with_name(f"{path.name.removesuffix('.jsonl')}.verdicts.jsonl")
    if out.exists() and not out.is_file():
        raise UserError(f"cannot write {out}: it is no regular file; give another one with --out")
    if out.exists() and path.exists() and out.samefile(path):
        raise UserError(f"--out {out} is the file of completions: give another file")
    check_folder(out.parent, "give another file with --out")
    scores = score_file(
        path,
        answer_key=flags.answer_key,
        completion_key=flags.completion_key,
        answer_format=flags.answer_format,
        workers=flags.workers,
        item_timeout_s=flags.item_timeout,
        thinking_open=flags.thinking_open,
        functions=flags.reward,
    )
    write_or_refuse(out, "".join(lines(scores)))
    print(f"verdicts: {out}")
    print(json.dumps(scores.summary))
    return 0


def _seconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and 0 < value <= LONGEST_ITEM_S):
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and {LONGEST_ITEM_S:,} seconds")
    return value


COMMAND = Command(
    name="score",
    help="score a file of completions against reference answers",
    words="FILE",
    run=run,
    flags={
        "--answer-key": {"required": True, "help": "column of the reference answer"},
        "--completion-key": {
            "required": True,
            "help": "column of a completion, or of a list of them",
        },
        "--answer-format": {
            "choices": [str(kind) for kind in AnswerFormat],
            "default": str(AnswerFormat.ANY),
            "help": "where the answer stands: <answer> tags, \\boxed{}, or either (default)",
        },
        "--reward": {
            "action": "append",
            "default": [],
            "metavar": "MODULE:FUNCTION",
            "help": "also call a reward function of your own; may be given several times",
        },
        "--out": {
            "type": Path,
            "help": "verdicts (default: FILE without .jsonl, plus .verdicts.jsonl)",
        },
        "--workers": {"type": at_least(1), "help": "processes (default: cores, at most 8)"},
        "--item-timeout": {
            "type": _seconds,
            "default": 5.0,
            "metavar": "S",
            "help": "seconds an answer",
        },
        "--thinking-open": switch(
            "the prompt ended with <think>: text before </think> is thinking"
        ),
    },
    examples=EXAMPLES,
)

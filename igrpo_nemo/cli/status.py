"""`igrpo status`: where a run stands, from its folder and from Slurm's queue."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from igrpo_nemo.cli.command import Command, at_least, switch
from igrpo_nemo.errors import UserError

if TYPE_CHECKING:
    from igrpo_nemo.cluster.client import Job

RUNS = Path("runs")

EXAMPLES = """\
  igrpo status                  a line for each run under runs/
  igrpo status runs/demo        one run, with the end of its log
  igrpo status demo --json      for programs; a name is looked for under runs/ too
"""


def run(flags: argparse.Namespace, words: Sequence[str]) -> int:
    from igrpo_nemo.cluster.status import block, log_tail, run_status, table

    folders = [_run_folder(word) for word in words] if words else _all_runs()
    jobs = _jobs()
    found = [(run_status(folder, jobs), log_tail(folder, flags.lines)) for folder in folders]
    if flags.json:
        values = [
            {**status, "log": {**log._asdict(), "path": str(log.path)} if log else None}
            for status, log in found
        ]
        print(json.dumps(values[0] if len(words) == 1 else values, indent=2))
    elif words:
        print("\n\n".join(block(status, log) for status, log in found))
    elif found:
        print(table([status for status, _ in found], RUNS))
    else:
        print(f"there are no runs under {RUNS}/: give a run folder")
    return 0


def _jobs() -> list[Job]:
    """The queue; none, with a word of why, where Slurm is there and does not answer."""
    from igrpo_nemo.cluster.client import has_slurm, my_jobs

    if not has_slurm():
        return []
    try:
        return my_jobs()
    except UserError as error:
        print(f"warning: the queue is not known: {error}", file=sys.stderr)
        return []


def _run_folder(word: str) -> Path:
    from igrpo_nemo.cluster.status import is_run

    for folder in (Path(word), RUNS / word):
        if is_run(folder):
            return folder
    raise UserError(
        f"{word} is no run folder, nor is {RUNS / word}: `igrpo status` lists those of {RUNS}/"
    )


def _all_runs() -> list[Path]:
    """The run folders under runs/, two levels deep."""
    from igrpo_nemo.cluster.status import is_run

    found = [folder for pattern in ("*", "*/*") for folder in RUNS.glob(pattern)]
    return sorted(folder for folder in found if folder.is_dir() and is_run(folder))


COMMAND = Command(
    name="status",
    help="say where a run stands, and show the end of its log",
    words="[RUN ...]",
    examples=EXAMPLES,
    flags={
        "--json": switch("print JSON"),
        "--lines": {
            "type": at_least(0),
            "default": 15,
            "metavar": "N",
            "help": "lines of the log to show (15)",
        },
    },
    run=run,
)

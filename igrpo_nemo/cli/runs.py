"""What is asked of run folders: `igrpo status`, `igrpo report`, `igrpo export`."""

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


def status(flags: argparse.Namespace, words: Sequence[str]) -> int:
    from igrpo_nemo.cluster.status import block, is_run, log_tail, run_status, table

    # Runs stand one or two levels deep.
    inside = sorted(folder for pattern in ("*", "*/*") for folder in RUNS.glob(pattern))
    every_run = [folder for folder in inside if folder.is_dir() and is_run(folder)]
    folders = [_run_folder(word) for word in words] if words else every_run
    jobs = _jobs()
    found = [(run_status(folder, jobs), log_tail(folder, flags.lines)) for folder in folders]
    if flags.json:
        values = [
            {**one, "log": {**log._asdict(), "path": str(log.path)} if log else None}
            for one, log in found
        ]
        print(json.dumps(values[0] if len(words) == 1 else values, indent=2))
    elif words:
        print("\n\n".join(block(one, log) for one, log in found))
    elif found:
        print(table([one for one, _ in found], RUNS))
    else:
        print(f"there are no runs under {RUNS}/: give a run folder")
    return 0


def _jobs() -> list[Job]:
    """The queue; none, with a word of why, where Slurm is there and does not answer."""
    from igrpo_nemo.cluster.client import has_slurm, my_jobs

    try:
        return my_jobs() if has_slurm() else []
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


def report(flags: argparse.Namespace, words: Sequence[str]) -> int:
    if not words:
        raise UserError("igrpo report needs a run or evaluation folder, such as runs/demo")
    from igrpo_nemo.report.page import build_report

    print(build_report([Path(word) for word in words], flags.out, anyway=flags.anyway))
    return 0


def export(flags: argparse.Namespace, words: Sequence[str]) -> int:
    if len(words) != 1:
        raise UserError("igrpo export needs one run folder, such as runs/demo")
    from igrpo_nemo.chain.export import export

    print(export(Path(words[0]), flags.to, which=flags.checkpoint, private=flags.private))
    return 0


STATUS = Command(
    name="status",
    help="say where a run stands, and show the end of its log",
    words="[RUN ...]",
    run=status,
    flags={
        "--json": switch("print JSON"),
        "--lines": {
            "type": at_least(0),
            "default": 15,
            "metavar": "N",
            "help": "lines of the log to show (15)",
        },
    },
    examples="""\
  igrpo status                  a line for each run under runs/
  igrpo status runs/demo        one run, with the end of its log
  igrpo status demo --json      for programs; a name is looked for under runs/ too
""",
)
REPORT = Command(
    name="report",
    help="write one HTML page about runs and evaluations",
    words="FOLDER [FOLDER ...]",
    run=report,
    flags={
        "--out": {"type": Path, "metavar": "FILE", "help": "the page (default: in the run folder)"},
        "--anyway": switch("compare evaluations of different settings too"),
    },
    examples="""\
  igrpo report runs/demo
  igrpo report runs/demo runs/demo_grpo --out comparison.html
  igrpo report runs/demo_grpo/evaluation/step_00000060 runs/demo/evaluation/step_00000060
""",
)
EXPORT = Command(
    name="export",
    help="publish the model of a run, with a model card",
    words="RUN",
    run=export,
    flags={
        "--to": {"required": True, "metavar": "FOLDER", "help": "a new folder, or hub:OWNER/NAME"},
        "--checkpoint": {"default": "last", "help": "last (default), best, or a step"},
        "--private": switch("a repository that the hub makes is private"),
    },
    examples="""\
  igrpo export runs/demo --to models/demo
  igrpo export runs/mine --to models/mine --checkpoint best
  igrpo export runs/mine --to hub:me/my-model --private        with HF_TOKEN in the environment
""",
)

"""`igrpo report`: one self-contained HTML page for runs overlaid and evaluations compared."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from igrpo_nemo.cli.command import Command, switch
from igrpo_nemo.errors import UserError

EXAMPLES = """\
  igrpo report runs/demo
  igrpo report runs/demo runs/demo_grpo --out comparison.html
  igrpo report runs/demo_grpo/evaluation/step_00000100 runs/demo/evaluation/step_00000100
"""


def run(flags: argparse.Namespace, run_dirs: Sequence[str]) -> int:
    if not run_dirs:
        raise UserError("igrpo report needs a run or evaluation folder, such as runs/demo")
    from igrpo_nemo.report.page import build_report

    print(build_report([Path(folder) for folder in run_dirs], flags.out, anyway=flags.anyway))
    return 0


COMMAND = Command(
    name="report",
    help="write one HTML page about runs and evaluations",
    words="FOLDER [FOLDER ...]",
    run=run,
    flags={
        "--out": {"type": Path, "metavar": "FILE", "help": "the page (default: in the run folder)"},
        "--anyway": switch("compare evaluations of different settings too"),
    },
    examples=EXAMPLES,
)

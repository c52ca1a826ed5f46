"""`igrpo report`: one self-contained HTML page for a run, or for several overlaid."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from igrpo_nemo.cli.command import Command
from igrpo_nemo.errors import UserError

EXAMPLES = """\
  igrpo report runs/demo
  igrpo report runs/demo runs/demo_grpo --out comparison.html
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the page to write (default: in the run folder)"
    )


def run(flags: argparse.Namespace, run_dirs: Sequence[str]) -> int:
    if not run_dirs:
        raise UserError("igrpo report needs a run folder, such as runs/demo")
    from igrpo_nemo.report.build import build_report

    print(build_report([Path(folder) for folder in run_dirs], flags.out))
    return 0


COMMAND = Command(
    name="report",
    help="write one HTML page about a run, or about several",
    usage="[--out FILE] [--traceback] RUN_DIR [RUN_DIR ...]",
    examples=EXAMPLES,
    add_flags=add_flags,
    run=run,
)

"""Compares evaluations: accuracy beside published figures, paired differences, pass@k curves.

    python pipelines/compare.py runs/grpo runs/igrpo
    python pipelines/compare.py GRPO=EVAL_1 iGRPO=EVAL_2 --experiment iGRPO=table1_..._igrpo

A folder is an evaluation's output, or a run folder with one evaluation. The first system is the
reference of all differences. Evaluations of different settings or problems are refused; --anyway
compares them all the same, with what differs in a table. docs/pipeline.md says how to read it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from igrpo_nemo.chain.script import DONE, ScriptParser, exit_code
from igrpo_nemo.chain.stages import compare


def main(words: Sequence[str]) -> int:
    parser = ScriptParser(__doc__, "compare.py [flags] [LABEL=]FOLDER ...")
    add = parser.add_argument
    add("systems", nargs="+", metavar="[LABEL=]FOLDER", help="evaluations or run folders")
    add("--out", type=Path, default=Path("comparison"), help="output folder (comparison)")
    add(
        "--experiment",
        action="append",
        default=[],
        metavar="[LABEL=]NAME",
        help="published figures to show, by default beside the last system",
    )
    add("--anyway", action="store_true", help="compare different settings too")
    flags = parser.parse_args(list(words))
    print(compare(flags.systems, flags.out, experiments=flags.experiment, anyway=flags.anyway))
    return DONE


if __name__ == "__main__":
    sys.exit(exit_code(main))

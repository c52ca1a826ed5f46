"""From a config to the comparison: train -> convert -> evaluate -> compare, here or on Slurm.

    python pipelines/train_and_evaluate.py experiment=demo
    python pipelines/train_and_evaluate.py experiment=table1_openmath_nemotron_14b_igrpo \\
        --against runs/table1_openmath_nemotron_14b_grpo --cluster slurm --skills-profile mine

The words are Hydra overrides, as of `igrpo train`. A stage that is done is not repeated; a changed
setting is named and never silently reused. The results are RUN/comparison/. docs/pipeline.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from igrpo_nemo.chain.experiment import SAMPLES, Experiment
from igrpo_nemo.chain.here import plan_here, run_here
from igrpo_nemo.chain.on_slurm import slurm_plan, submit_all
from igrpo_nemo.chain.script import DONE, ScriptParser, exit_code, overrides_of
from igrpo_nemo.cli.command import EVALUATION, at_least, chain_length
from igrpo_nemo.config import load_config

CHECKOUT = Path(__file__).resolve().parents[1]
OWN = ("cluster", "dry_run")
"""Flags that say how the script runs; all others are fields of `Experiment`."""


def main(words: Sequence[str]) -> int:
    flags, rest = _parser().parse_known_args(list(words))
    overrides = overrides_of(rest)
    base = Path()
    if flags.cluster is not None:
        # Relative paths mean the same here and in the jobs, which run in the checkout.
        os.chdir(CHECKOUT)
        base = CHECKOUT
    config = load_config(overrides)
    named = {name: value for name, value in vars(flags).items() if name not in OWN}
    run = base / config.logger.log_dir
    chain = Experiment(tuple(overrides), config, run, checkout=CHECKOUT, **named)
    if flags.dry_run:
        plan = plan_here if flags.cluster is None else slurm_plan
        print(plan(chain, os.environ))
        return DONE
    work = run_here if flags.cluster is None else submit_all
    return work(chain, os.environ)


def _parser() -> argparse.ArgumentParser:
    parser = ScriptParser(__doc__, "train_and_evaluate.py [flags] key=value ...")
    add = parser.add_argument
    add(
        "--checkpoint",
        dest="which",
        default="last",
        metavar="last|best|N",
        help="which one to evaluate (last)",
    )
    add(
        "--against",
        action="append",
        default=[],
        metavar="[LABEL=]FOLDER",
        help="another system to compare with, the reference first; may be repeated",
    )
    add("--anyway", action="store_true", help="compare evaluations of other settings too")
    add("--dry-run", action="store_true", help="print the whole plan, start nothing")
    what = parser.add_argument_group("the evaluation")
    what.add_argument(
        "--evaluator",
        choices=["auto", "nemo_skills", "igrpo"],
        default="auto",
        help="auto, the default: NeMo-Skills where it is found, else igrpo evaluate",
    )
    what.add_argument(
        "--samples", type=at_least(1), default=SAMPLES, help="on a run's own problems (4)"
    )
    for name, options in EVALUATION.items():
        what.add_argument(name, **options)
    where = parser.add_argument_group("Slurm")
    where.add_argument("--cluster", choices=["slurm"], help="submit everything to Slurm")
    where.add_argument(
        "--chain",
        dest="continuations",
        type=chain_length,
        default=1,
        metavar="K",
        help="jobs in a row (1)",
    )
    where.add_argument(
        "--skills-profile",
        metavar="NAME",
        help="NeMo-Skills' cluster profile, made by cluster_config.py (the shipped one of the GPU, "
        "such as slurm_a100: as shipped it is refused)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(exit_code(main))

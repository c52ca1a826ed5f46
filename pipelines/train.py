"""Trains a run, here or on Slurm, unless it is finished already.

    python pipelines/train.py experiment=demo
    python pipelines/train.py experiment=table1_openmath_nemotron_14b_igrpo --cluster slurm

On Slurm it is `igrpo launch`: a job that requeues itself until the run is finished, or with
--chain K so many jobs, each behind the one before. Exit code 75: stopped with its state saved.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from igrpo_nemo.chain.experiment import is_trained
from igrpo_nemo.chain.here import train_here
from igrpo_nemo.chain.script import DONE, ScriptParser, exit_code, overrides_of
from igrpo_nemo.cli import main as igrpo
from igrpo_nemo.cli.command import chain_length
from igrpo_nemo.cluster.launch import plan_text, prepare_launch, submit_launch
from igrpo_nemo.config import load_config

CHECKOUT = Path(__file__).resolve().parents[1]


def main(words: Sequence[str]) -> int:
    parser = ScriptParser(__doc__, "train.py [flags] key=value ...")
    add = parser.add_argument
    add("--cluster", choices=["slurm"], help="submit to Slurm (default: train on this machine)")
    add(
        "--chain",
        type=chain_length,
        default=1,
        metavar="K",
        help="continuation jobs (1: it requeues)",
    )
    add("--dry-run", action="store_true", help="print what would be trained or submitted")
    flags, rest = parser.parse_known_args(list(words))
    overrides = overrides_of(rest)
    if flags.cluster is not None:
        os.chdir(CHECKOUT)  # relative paths mean the same here and in the job
    config = load_config(overrides)
    if flags.cluster is None and not flags.dry_run:
        return train_here(config, overrides)
    if flags.cluster is None:
        return igrpo(["train", "--dry-run", *overrides])
    if not flags.dry_run and is_trained(config):
        print(f"train: {config.logger.log_dir} is finished")
        return DONE
    jobs = flags.chain if flags.chain > 1 else None
    launch = prepare_launch(overrides, CHECKOUT, os.environ, chain=jobs, dry_run=flags.dry_run)
    if flags.dry_run:
        print(plan_text(launch), end="")
    else:
        submit_launch(launch, os.environ)
    return DONE


if __name__ == "__main__":
    sys.exit(exit_code(main))

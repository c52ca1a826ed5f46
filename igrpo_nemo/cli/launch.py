"""`igrpo launch`: checks a run on the login node and submits it to Slurm.

config, profile -> finished already? queued already? preflight -> sbatch slurm/X.sh
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from igrpo_nemo.cli.command import Command, chain_length, switch
from igrpo_nemo.errors import UserError

EXIT_REFUSED = 1

EXAMPLES = """\
  igrpo launch experiment=table1_openmath_nemotron_14b_igrpo
  igrpo launch experiment=table1_openmath_nemotron_14b_igrpo --dry-run
  igrpo launch --script slurm/train_igrpo_14b.sh grpo.seed=1 logger.log_dir=runs/seed1
  igrpo launch experiment=demo --chain 3               three jobs, one behind the other

Plain sbatch does not read cluster.local.yaml: give it the profile as variables.
  profile=$(igrpo launch --env a100_5x8) && eval "$profile" && sbatch slurm/train_igrpo_14b.sh

Account, partition, container and paths come from the group `cluster`, from cluster.local.yaml and
from the environment; `igrpo keys igrpo.site` lists them. Paths are relative to the checkout.
"""


def run(flags: argparse.Namespace, overrides: Sequence[str]) -> int:
    from igrpo_nemo.cluster.job import find_checkout

    start = Path.cwd()
    checkout = find_checkout(start)
    # Relative paths mean the same here, in the preflight and in the job.
    os.chdir(checkout)
    if flags.env is not None:
        return _print_exports(flags.env, checkout, overrides)
    if flags.job_settings:
        return _print_settings(flags.script, checkout, overrides)
    return _launch(flags, overrides, start, checkout)


def _print_exports(profile: str, checkout: Path, overrides: Sequence[str]) -> int:
    from igrpo_nemo.cluster.launch import NO_RUN, composed
    from igrpo_nemo.cluster.site import exports

    if other := [word for word in overrides if not word.lstrip("+").startswith("igrpo.site.")]:
        raise UserError(f"igrpo launch --env takes igrpo.site.* alone, not {other[0]}")
    config = composed([f"cluster={profile}", *NO_RUN, *overrides], checkout, os.environ)
    print(exports(config.igrpo.site), end="")
    return 0


def _print_settings(script: str | None, checkout: Path, words: Sequence[str]) -> int:
    from igrpo_nemo.cluster.launch import composed, job_words, reopen_if_longer
    from igrpo_nemo.cluster.site import absolute, assignments, job_settings

    config = composed(job_words(script, words), checkout, os.environ)
    text = assignments(job_settings(config, checkout, os.environ))
    reopen_if_longer(absolute(config.logger.log_dir, checkout), config)
    print(text, end="")
    return 0


def _launch(flags: argparse.Namespace, words: Sequence[str], start: Path, checkout: Path) -> int:
    from igrpo_nemo.cluster.launch import (
        PreflightRefusal,
        plan_text,
        prepare_launch,
        submit_launch,
    )

    try:
        launch = prepare_launch(
            words,
            checkout,
            os.environ,
            script=flags.script,
            start=start,
            chain=flags.chain,
            dry_run=flags.dry_run,
        )
    except PreflightRefusal as refusal:
        for problem in refusal.problems:
            print(f"preflight: {problem}", file=sys.stderr)
        print("error: the preflight says no, nothing was submitted", file=sys.stderr)
        return EXIT_REFUSED
    if flags.dry_run:
        print(plan_text(launch), end="")
    else:
        submit_launch(launch, os.environ)
    return 0


COMMAND = Command(
    name="launch",
    help="check a run and submit it to Slurm",
    words="key=value ...\n"
    "       igrpo launch --script slurm/evaluate.sh WORD ...\n"
    "       igrpo launch --env PROFILE [igrpo.site.key=value ...]\n"
    "       igrpo launch [--script FILE] --job-settings WORD ...",
    run=run,
    flags={
        "--script": {"metavar": "FILE", "help": "the script to submit (default: slurm/train.sh)"},
        "--dry-run": switch("print the checks, the sbatch command and the script; submit nothing"),
        "--chain": {
            "type": chain_length,
            "metavar": "K",
            "help": "submit K jobs, each behind the one before, for sites that do not requeue",
        },
        "--env": {"metavar": "PROFILE", "help": "print a profile as exports for plain sbatch"},
        "--job-settings": switch("print what the job script reads: NAME='value' lines"),
    },
    examples=EXAMPLES,
    passes_flags=lambda flags: Path(flags.script or "").name == "evaluate.sh",
)

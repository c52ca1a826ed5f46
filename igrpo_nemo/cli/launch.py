"""`igrpo launch`: checks a run on the login node and submits it to Slurm.

config, profile -> finished already? queued already? preflight -> sbatch slurm/X.sh
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from igrpo_nemo.cli.command import Command
from igrpo_nemo.errors import UserError

if TYPE_CHECKING:
    from igrpo_nemo.cluster.job import Submission
    from igrpo_nemo.config import Config
    from igrpo_nemo.config.site_keys import Site
    from igrpo_nemo.preflight import Plan

EXIT_REFUSED = 1
CHAIN_MAX = 100
NO_RUN = ("engine=nemo_rl", "policy.model_name=none")
"""Makes a config complete of which only the cluster profile is wanted."""
EVALUATION_LOGS = "runs/evaluate"

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


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--script", metavar="FILE", help="the script to submit (default: slurm/train.sh)"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the checks, the sbatch command and the script, and submit nothing",
    )
    parser.add_argument(
        "--chain",
        type=_chain_length,
        metavar="K",
        help="submit K jobs, each behind the one before, for sites that do not requeue",
    )
    parser.add_argument(
        "--env", metavar="PROFILE", help="print a cluster profile as exports for plain sbatch"
    )
    parser.add_argument(
        "--job-settings",
        action="store_true",
        help="print what the job script reads: NAME='value' lines",
    )


def run(flags: argparse.Namespace, overrides: Sequence[str]) -> int:
    from igrpo_nemo.cluster.checkout import find_checkout

    start = Path.cwd()
    checkout = find_checkout(start)
    # Relative paths mean the same here, in the preflight and in the job.
    os.chdir(checkout)
    if flags.env is not None:
        return _print_exports(flags, checkout, overrides)
    if _is_evaluation(flags):
        return _launch_evaluation(flags, overrides, start, checkout)
    if flags.job_settings:
        return _print_settings(checkout, overrides)
    return _launch(flags, overrides, start, checkout)


def _composed(checkout: Path, overrides: Sequence[str]) -> tuple[Config, Site]:
    from igrpo_nemo.cluster.site import site_profile
    from igrpo_nemo.config import load_config

    config = load_config(overrides)
    site = site_profile(config, checkout, os.environ, overrides)
    return config.replaced("igrpo", site=site), site


def _print_exports(flags: argparse.Namespace, checkout: Path, overrides: Sequence[str]) -> int:
    from igrpo_nemo.cluster.settings import exports

    if other := [word for word in overrides if not word.lstrip("+").startswith("igrpo.site.")]:
        raise UserError(f"igrpo launch --env takes igrpo.site.* alone, not {other[0]}")
    _, site = _composed(checkout, [f"cluster={flags.env}", *NO_RUN, *overrides])
    print(exports(site), end="")
    return 0


def _print_settings(checkout: Path, overrides: Sequence[str]) -> int:
    from igrpo_nemo.cluster.job import absolute
    from igrpo_nemo.cluster.settings import assignments, job_settings
    from igrpo_nemo.cluster.submit import reopen_if_longer

    config, site = _composed(checkout, overrides)
    text = assignments(job_settings(config, site, checkout, os.environ))
    reopen_if_longer(absolute(config.logger.log_dir, checkout), config)
    print(text, end="")
    return 0


def _launch(
    flags: argparse.Namespace, overrides: Sequence[str], start: Path, checkout: Path
) -> int:
    from igrpo_nemo.cluster.checkout import find_script, script_words
    from igrpo_nemo.cluster.job import submission
    from igrpo_nemo.cluster.submit import (
        dry_run_text,
        is_finished,
        queued_jobs,
        reopen_if_longer,
        submit_chain,
        submitted_text,
    )

    script = find_script(flags.script, start, checkout)
    words = [*script_words(checkout / script), *overrides]
    config, site = _composed(checkout, words)
    job = submission(config, site, script, words, checkout)
    _check_resumable(config, job)
    if is_finished(job.run_folder, config):
        hint = "raise grpo.max_num_steps to go on"
        print(f"{job.run_folder} is finished: nothing to submit ({hint})")
        return 0
    length = flags.chain or 1
    queued = [] if flags.dry_run else queued_jobs(job, in_chain=flags.chain is not None)
    plan = _preflight(config)
    if plan.problems:
        return _refuse(plan)
    if flags.dry_run:
        print(dry_run_text(job, length, plan.text(), checkout), end="")
        return 0
    if reopen_if_longer(job.run_folder, config):
        print(f"{job.run_folder} was finished and goes on")
    print(submitted_text(job, submit_chain(job, length, queued, checkout, os.environ)))
    return 0


def _check_resumable(config: Config, job: Submission) -> None:
    """Raises `UserError` where the run folder is another run's."""
    from igrpo_nemo.run.folder import check_same_run

    if not config.checkpointing.enabled:
        warnings.warn(
            "checkpointing.enabled=false: a job that is stopped starts over", stacklevel=2
        )
    if config.igrpo.model is None:  # a built-in model gets its name when it is made
        check_same_run(job.run_folder, config.to_dict())


def _refuse(plan: Plan) -> int:
    for problem in plan.problems:
        print(f"preflight: {' '.join(problem.split())}", file=sys.stderr)
    print("error: the preflight says no, nothing was submitted", file=sys.stderr)
    return EXIT_REFUSED


def _is_evaluation(flags: argparse.Namespace) -> bool:
    from igrpo_nemo.cluster.checkout import EVALUATION_SCRIPT

    return flags.script is not None and Path(flags.script).name == EVALUATION_SCRIPT


def _launch_evaluation(
    flags: argparse.Namespace, words: Sequence[str], start: Path, checkout: Path
) -> int:
    """Submits slurm/evaluate.sh: of its words the cluster profile's alone are read here."""
    from igrpo_nemo.cluster.checkout import find_script
    from igrpo_nemo.cluster.job import submission
    from igrpo_nemo.cluster.submit import dry_run_text, submit_chain, submitted_text

    if flags.chain is not None:
        raise UserError("--chain is for training: an evaluation goes on where it was by itself")
    own = [word for word in words if word.lstrip("+").startswith(("cluster=", "igrpo.site."))]
    config, site = _composed(checkout, [*NO_RUN, f"logger.log_dir={EVALUATION_LOGS}", *own])
    script = find_script(flags.script, start, checkout)
    job = submission(config, site, script, words, checkout, training=False)
    if flags.dry_run:
        print(dry_run_text(job, 1, "", checkout), end="")
    else:
        print(submitted_text(job, submit_chain(job, 1, [], checkout, os.environ)))
    return 0


def _preflight(config: Config) -> Plan:
    from igrpo_nemo.preflight import preflight

    hf_home = config.igrpo.site.hf_home
    return preflight(config, environ={**os.environ, **({"HF_HOME": hf_home} if hf_home else {})})


def _chain_length(text: str) -> int:
    number = int(text)
    if not 1 <= number <= CHAIN_MAX:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and {CHAIN_MAX}")
    return number


COMMAND = Command(
    name="launch",
    help="check a run and submit it to Slurm",
    usage="[--script FILE] [--dry-run] [--chain K] [--traceback] key=value ...\n"
    "       igrpo launch --script slurm/evaluate.sh WORD ...\n"
    "       igrpo launch --env PROFILE [igrpo.site.key=value ...]\n"
    "       igrpo launch --job-settings key=value ...",
    examples=EXAMPLES,
    add_flags=add_flags,
    run=run,
    passes_flags=_is_evaluation,
)

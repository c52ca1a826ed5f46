"""The training stage: `igrpo train` on this machine, or `igrpo launch` on Slurm."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from igrpo_nemo.chain.experiment import LENGTH
from igrpo_nemo.chain.script import STOPPED, run_to_its_end
from igrpo_nemo.cluster.launch import is_finished, plan_text, prepare_launch, submit_launch
from igrpo_nemo.config import Config
from igrpo_nemo.config.section import at
from igrpo_nemo.errors import UserError
from igrpo_nemo.run.folder import FINISHED, stored_config
from igrpo_nemo.run.identity import check_same_run

IGRPO = (sys.executable, "-c", "from igrpo_nemo.cli import main; raise SystemExit(main())")
"""The command `igrpo` of this interpreter, wherever it is installed."""


def is_trained(config: Config) -> bool:
    """Whether the run is finished with these settings.

    Raises `UserError` naming the first setting that is another one than the run's: for a shorter
    run too, whose weights this folder no longer has.
    """
    run, now = Path(config.logger.log_dir), config.to_dict()
    if not (before := stored_config(run)):
        return False
    check_same_run(run, now)
    for key in LENGTH:
        old, new = at(before, key), at(now, key)
        if isinstance(old, int) and isinstance(new, int) and new < old:
            raise UserError(
                f"{run} holds a run with {key}={old}, this one has {new}: choose another "
                "logger.log_dir, or remove that folder"
            )
    return is_finished(run, config)


def train_here(config: Config, words: Sequence[str]) -> int:
    """Trains as `igrpo train` does, unless that is done already. 75: stopped, to be resumed."""
    run = Path(config.logger.log_dir)
    if is_trained(config):
        print(f"train: {run} is finished")
        return 0
    print(f"train: {shlex.join(['igrpo', 'train', *words])}", flush=True)
    code = run_to_its_end([*IGRPO, "train", *words])
    if code == 0 and not (run / FINISHED).is_file():
        code = STOPPED
    if code == STOPPED:
        print(f"train: {run} stopped with its state saved; the same command goes on")
    return code


def submit_training(
    config: Config, words: Sequence[str], jobs: int, checkout: Path, environ: Mapping[str, str]
) -> list[int]:
    """Submits the run as `igrpo launch` does, with `jobs` continuation jobs; a single one continues
    itself. The job ids, none where the run is finished already.

    Raises `UserError` where the launch is refused.
    """
    if is_trained(config):
        print(f"train: {config.logger.log_dir} is finished")
        return []
    launch = prepare_launch(words, checkout, environ, chain=jobs if jobs > 1 else None)
    return submit_launch(launch, environ)


def training_plan(
    words: Sequence[str], jobs: int, checkout: Path, environ: Mapping[str, str]
) -> str:
    """What `submit_training` would check and submit."""
    chain = jobs if jobs > 1 else None
    return plan_text(prepare_launch(words, checkout, environ, chain=chain, dry_run=True))

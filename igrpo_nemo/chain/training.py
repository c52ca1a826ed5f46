"""The training stage: `igrpo train` on this machine, or `igrpo launch` on Slurm.

RUN/stages/train.json holds what the run is trained with; RUN/finished says that it is done.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from igrpo_nemo.chain.experiment import (
    LENGTH,
    Stamp,
    first_change,
    read_stamp,
    shaping,
    training_inputs,
    write_stamp,
)
from igrpo_nemo.chain.script import STOPPED, run_to_its_end
from igrpo_nemo.cluster.launch import (
    is_finished,
    plan_text,
    prepare_launch,
    submit_launch,
)
from igrpo_nemo.config import Config
from igrpo_nemo.errors import UserError
from igrpo_nemo.run.folder import FINISHED

IGRPO = (sys.executable, "-c", "from igrpo_nemo.cli import main; raise SystemExit(main())")
"""The command `igrpo` of this interpreter, wherever it is installed."""


def stamp_path(run: Path) -> Path:
    return run / "stages" / "train.json"


def is_trained(config: Config) -> bool:
    """Whether the run is finished with these settings.

    Raises `UserError` naming the first setting that is another one than the run's: for a shorter
    run too, whose weights this folder no longer has.
    """
    run = Path(config.logger.log_dir)
    if not (run / "config.yaml").is_file():
        return False
    before, now = dict(_trained_with(run, config)), training_inputs(config)
    for key in LENGTH:
        old, new = before.get(key), now.get(key)
        if not (isinstance(old, int) and isinstance(new, int) and new < old):  # no shorter run
            before.pop(key, None)
            now.pop(key, None)
    if change := first_change(before, now):
        name, old, new = change
        raise UserError(
            f"{run} was trained with {name}={old!r}, now it is {new!r}: choose another "
            "logger.log_dir, or remove that folder"
        )
    return is_finished(run, config)


def _trained_with(run: Path, config: Config) -> Mapping[str, Any]:
    """The inputs of the run's stamp, or of its config.yaml where it was trained without one."""
    if stamp := read_stamp(stamp_path(run)):
        return stamp.inputs
    inputs = shaping(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) or {})
    if config.igrpo.model is not None:
        # NeMo-RL's engines store the folder that the built-in model was made in.
        now = training_inputs(config)
        inputs |= {key: now[key] for key in ("policy.model_name", "policy.tokenizer.name")}
    return inputs


def train_here(config: Config, words: Sequence[str]) -> int:
    """Trains as `igrpo train` does, unless that is done already. 75: stopped, to be resumed."""
    run = Path(config.logger.log_dir)
    if is_trained(config):
        print(f"train: {run} is finished")
        return 0
    write_stamp(stamp_path(run), Stamp("train", training_inputs(config)))
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
    write_stamp(stamp_path(Path(config.logger.log_dir)), Stamp("train", training_inputs(config)))
    return submit_launch(launch, environ)


def training_plan(
    words: Sequence[str], jobs: int, checkout: Path, environ: Mapping[str, str]
) -> str:
    """What `submit_training` would check and submit."""
    chain = jobs if jobs > 1 else None
    return plan_text(prepare_launch(words, checkout, environ, chain=chain, dry_run=True))

"""`igrpo train engine=nemo_rl`: the project's config through NeMo-RL's `setup()` and `grpo_train`.

config ─ problems, checks ─> MasterConfig ─> Ray, tokenizer, data, environments ─> setup()
       ─> our loss, marker map, loader, log ─> NeMo-RL's trainer, unmodified

With engine `nemo_rl_local` the model is the embedded engine's, in this process; the rest is the
same code.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from igrpo_nemo.config import Config, with_problems
from igrpo_nemo.config.launch_checks import check_launch
from igrpo_nemo.errors import UserError
from igrpo_nemo.nemo.processes import (
    nodes_lost,
    prepare_environment,
    put_package_on_path,
    ray_running,
)
from igrpo_nemo.run.folder import RunFolder
from igrpo_nemo.run.stop import StopFile

if TYPE_CHECKING:
    from igrpo_nemo.nemo.master_config import OpenedRun
    from igrpo_nemo.nemo.setup import Parts


def train(config: Config) -> int:
    """Trains as configured, resuming NeMo-RL's newest checkpoint.

    Returns 0 when the last step is done, and when the time limit or the stop file ended training
    before; 1 when the trainer returned for neither reason, 70 if Ray has lost a node by then.
    Raises `UserError` for what cannot work, before anything is started, and `LostProcessError`
    where Ray lost a process of the run.
    """
    prepare_environment(config)
    from igrpo_nemo.nemo.names import check_nemo_rl

    check_nemo_rl()
    from igrpo_nemo.nemo.resume import StopRequest
    from igrpo_nemo.nemo.seam import installed
    from igrpo_nemo.nemo.setup import set_up

    with RunFolder(config.logger.log_dir) as folder, ExitStack() as stack:
        opened = open_run(config, folder)
        folder.write_plan(opened.total_steps)
        put_package_on_path(folder.path)
        stack.enter_context(ray_running(opened.config))
        stack.enter_context(installed())
        parts = set_up(opened, folder, stack)
        if parts.clock.finished < opened.total_steps:
            folder.unmark_finished()
        start = time.monotonic()
        with StopRequest(StopFile.of()) as stop:
            _run(parts.run_trainer)
        if is_finished(opened, parts.clock.finished, stop.given):
            parts.save_last()
        return _close_run(opened, parts, folder, time.monotonic() - start, stop.given)


def _run(trainer: Callable[[], None]) -> None:
    from igrpo_nemo.nemo.failure import LostProcessError, is_lost_process

    try:
        trainer()
    except Exception as error:
        if is_lost_process(error):
            raise LostProcessError(" ".join(str(error).split())[:1_000]) from error
        raise


def open_run(config: Config, folder: RunFolder) -> OpenedRun:
    """Loads the problems, fills in what follows from their number, and checks everything."""
    from nemo_rl.algorithms.utils import get_tokenizer

    from igrpo_nemo.nemo.data import write_problems
    from igrpo_nemo.nemo.master_config import OpenedRun, master_config, total_steps
    from igrpo_nemo.nemo.trainers import check_trainer
    from igrpo_nemo.run.core import prompt_builder
    from igrpo_nemo.run.folder import check_same_run
    from igrpo_nemo.run.inputs import check_same_inputs
    from igrpo_nemo.run.problems import fitting_problems, training_problems, validation_problems
    from igrpo_nemo.run.tokenizer import check_tags_are_text, load_tokenizer

    problems, validation = training_problems(config), validation_problems(config)
    if config.igrpo.model is not None:
        config = _with_small_model(config)
    load_tokenizer(config.policy.tokenizer.name)  # a clear error, where there is none
    tokenizer = get_tokenizer(config.to_dict()["policy"]["tokenizer"])
    check_tags_are_text(tokenizer)
    prompts = prompt_builder(config, tokenizer)
    drop = config.igrpo.drop_overlong_prompts
    problems = fitting_problems(problems, prompts, drop_overlong=drop)
    validation = fitting_problems(validation, prompts, drop_overlong=drop)
    config = with_problems(config, len(problems))
    check_launch(config)
    check_trainer(config)
    check_same_run(folder.path, config.to_dict())
    check_same_inputs(folder.path, config, problems, validation)
    train_path = folder.path / "problems" / "train.jsonl"
    validation_path = folder.path / "problems" / "validation.jsonl" if validation else None
    write_problems(problems, train_path)
    if validation_path is not None:
        write_problems(validation, validation_path)
    master = master_config(
        config,
        train_path=train_path.resolve(),
        validation_path=validation_path and validation_path.resolve(),
        num_validation=len(validation),
    )
    folder.write_config(config.to_dict())
    return OpenedRun(config, master, len(problems), total_steps(config, len(problems)))


def _with_small_model(config: Config) -> Config:
    """Names the folder of the built-in small model, made and warmed up where it is missing."""
    if config.igrpo.engine == "nemo_rl":
        raise UserError("engine=nemo_rl trains a Hugging Face model: use model=hf")
    from igrpo_nemo.nemo.cpu.setup import with_small_model

    return with_small_model(config)


def _close_run(
    opened: OpenedRun, parts: Parts, folder: RunFolder, seconds: float, stopped: bool
) -> int:
    """The summary and, where the last step is done, the marker; the exit code.

    The summary is the whole run's; that of a finished run that was only asked for again stays.
    """
    from igrpo_nemo.nemo.failure import LostProcessError
    from igrpo_nemo.nemo.resume import summary_of

    log, steps = parts.log, parts.clock.finished
    finished = is_finished(opened, steps, stopped)
    summary = {
        "val_accuracy_start": log.first_accuracy,
        "val_accuracy_end": log.last_accuracy,
        "steps": steps,
        "seconds": parts.earlier.seconds + seconds,
        "training_seconds": log.seconds,
        "completions": log.completions,
        "completions_per_second": log.completions / log.seconds if log.seconds else None,
        "finished": finished,
    }
    asked_again = steps == parts.earlier.steps and summary_of(folder.path).get("finished")
    if not (finished and asked_again):
        folder.write_summary(summary)
    if finished:
        folder.mark_finished(steps)
        print(f"done: {steps} steps; results in {folder.path}")
    elif stopped:
        folder.unmark_finished()
        print(f"stopped after step {steps}, to be resumed; results in {folder.path}")
    else:
        # NeMo-RL's asynchronous trainer prints what goes wrong in it and returns.
        print(
            f"error: NeMo-RL's trainer ended after step {steps} of {opened.total_steps} without "
            "having been asked to: its own messages above say why",
            file=sys.stderr,
        )
        return LostProcessError.exit_code if nodes_lost() else 1
    return 0


def is_finished(opened: OpenedRun, steps: int, stopped: bool) -> bool:
    """Whether the last step is done. Under dynamic sampling steps draw several batches, so a run
    that nobody stopped may also end with its data."""
    if steps >= opened.total_steps:
        return True
    return opened.config.grpo.use_dynamic_sampling and not stopped

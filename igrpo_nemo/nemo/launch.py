"""`igrpo train engine=nemo_rl`: the project's config through NeMo-RL's `setup()` and `grpo_train`.

config ─ problems, checks ─> MasterConfig ─> Ray, tokenizer, data, environments ─> setup()
       ─> our loss, marker map, loader, log ─> NeMo-RL's trainer, unmodified

With engine `nemo_rl_local` the model is the embedded engine's, in this process; the rest is the
same code.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack

from igrpo_nemo.config import Config
from igrpo_nemo.nemo.failure import LostProcessError, named_errors
from igrpo_nemo.nemo.names import check_keys, check_nemo_rl
from igrpo_nemo.nemo.processes import (
    nodes_lost,
    prepare_environment,
    put_package_on_path,
    ray_running,
)
from igrpo_nemo.run.folder import RunFolder
from igrpo_nemo.run.stop import StopFile


def train(config: Config) -> int:
    """Trains as configured, resuming NeMo-RL's newest checkpoint.

    Returns 0 when the last step is done, and when the time limit or the stop file ended training
    before; 1 when the trainer returned for neither reason, 70 if Ray has lost a node by then.
    Raises `UserError` for what cannot work, before anything is started, and `LostProcessError`
    where Ray lost a process of the run.
    """
    prepare_environment(config)
    check_nemo_rl()
    check_keys(config.to_dict())
    from igrpo_nemo.nemo.master_config import open_run
    from igrpo_nemo.nemo.resume import stop_requests
    from igrpo_nemo.nemo.seam import installed
    from igrpo_nemo.nemo.setup import set_up

    with RunFolder(config.logger.log_dir) as folder, ExitStack() as stack:
        opened = open_run(config, folder)
        total = opened.total_steps
        folder.write_plan(total)
        put_package_on_path(folder.path)
        stack.enter_context(ray_running(opened.config))
        stack.enter_context(installed())
        parts = set_up(opened, folder, stack)
        if parts.clock.finished < total:
            folder.unmark_finished()
        start = time.monotonic()
        with stop_requests(StopFile.of()) as stop, named_errors():
            parts.run_trainer()
        steps = parts.clock.finished
        finished = is_finished(config, steps, total, stop.given)
        if finished and 0 < steps < total:
            parts.save_last()
        parts.log.write_summary(folder, time.monotonic() - start, finished)
        if finished:
            folder.mark_finished(steps)
            print(f"done: {steps} steps; results in {folder.path}")
        elif stop.given:
            folder.unmark_finished()
            print(f"stopped after step {steps}, to be resumed; results in {folder.path}")
        else:
            # NeMo-RL's asynchronous trainer prints what goes wrong in it and returns.
            print(
                f"error: NeMo-RL's trainer ended after step {steps} of {total} without having "
                "been asked to: its own messages above say why",
                file=sys.stderr,
            )
            return LostProcessError.exit_code if nodes_lost() else 1
        return 0


def is_finished(config: Config, steps: int, total_steps: int, stopped: bool) -> bool:
    """Whether the last step is done. A run that nobody stopped may also end with its data: under
    dynamic sampling steps draw several batches, and a curriculum leaves problems out."""
    fewer = config.grpo.use_dynamic_sampling or config.igrpo.curriculum_keep is not None
    return steps >= total_steps or fewer and not stopped

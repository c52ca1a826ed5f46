"""NeMo-RL's own `setup()`, with the project's environment, data, loss, map and log in it.

registered environment and processor ─> data sets, environments ─> setup() ─> arguments
arguments with our map, loader, loss and log ─> the trainer, ready to be called
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from nemo_rl.algorithms.grpo import setup
from nemo_rl.algorithms.utils import get_tokenizer
from nemo_rl.data.utils import setup_response_data
from nemo_rl.models.generation import configure_generation_config
from ray.exceptions import RayTaskError

from igrpo_nemo.config import Config
from igrpo_nemo.nemo import data, environment
from igrpo_nemo.nemo.converted_model import converted_once
from igrpo_nemo.nemo.loss import build_loss
from igrpo_nemo.nemo.master_config import OpenedRun
from igrpo_nemo.nemo.prefetch import LookaheadLoader, Prefetcher
from igrpo_nemo.nemo.processes import use_one_python
from igrpo_nemo.nemo.resume import Progress, carry_tokenizer, refuse_non_finite, save_last_step
from igrpo_nemo.nemo.rollout import TrainingMap, ValidationMap
from igrpo_nemo.nemo.run_log import LoggersTables, RunLog
from igrpo_nemo.nemo.seam import StepClock
from igrpo_nemo.nemo.trainers import finished_steps, trainer, uses_data_plane
from igrpo_nemo.nemo.versions import entries, finalized, newest_checkpoint
from igrpo_nemo.run.folder import RunFolder
from igrpo_nemo.tracking import Tracker
from igrpo_nemo.tracking.tracker import JsonlSink


@dataclass
class Parts:
    """What NeMo-RL's trainer is called with, and what the run leaves behind."""

    run_trainer: Callable[[], None]
    save_last: Callable[[], None]
    log: RunLog
    clock: StepClock


def set_up(opened: OpenedRun, folder: RunFolder, stack: ExitStack) -> Parts:
    """Everything up to the trainer's call; `stack` closes what it opens."""
    config, master = opened.config, opened.master
    arguments, loader, teachers = made_by_nemo_rl(opened, stack)
    clock = StepClock(finished_steps(config, arguments["grpo_save_state"]))
    folder.truncate_after(clock.finished if clock.finished else -1)
    if clock.finished:
        # NeMo-RL takes the first step of any epoch for the first of the run.
        entries(master.grpo)["val_at_start"] = False
    task_to_env, validation = maps(config, arguments, clock)
    if config.feedback.two_stage and config.igrpo.draft_prefetch == "fused":
        loader = LookaheadLoader(loader)
        task_to_env.prefetcher = Prefetcher(loader, clock, opened.total_steps)
    curriculum = None
    if config.igrpo.curriculum_keep is not None:
        loader = data.CurriculumLoader(loader, config)
        loader.resume(newest_checkpoint(arguments["checkpointer"]))
        curriculum = loader.order
    log = RunLog(
        arguments["logger"],
        config,
        Tracker([JsonlSink(folder), LoggersTables(arguments["logger"])]),
        task_to_env,
        measured=validation.take if isinstance(validation, ValidationMap) else dict,
        peak_memory=lambda: peak_training_memory(arguments["policy"]),
        progress=Progress.before(folder.path, clock.finished),
        curriculum=curriculum,
    )
    arguments |= {
        "task_to_env": task_to_env,
        "val_task_to_env": validation,
        "loss_fn": build_loss(arguments["loss_fn"], master.loss_fn, config, master.policy),
        "logger": log,
    }
    diverged = refuse_non_finite(arguments["policy"], arguments["checkpointer"], clock)
    call = trainer(config, opened.total_steps, loader, arguments, **teachers)

    def run_trainer() -> None:
        call()
        if diverged:
            raise diverged[0]

    return Parts(run_trainer, lambda: save_last_step(arguments, loader, clock.finished), log, clock)


def made_by_nemo_rl(
    opened: OpenedRun, stack: ExitStack
) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """NeMo-RL's data sets, environments and `setup()`, as arguments of its trainers: those of all
    three; the data loader; those of the asynchronous one alone."""
    config, master = opened.config, opened.master
    environment.register()
    use_one_python()
    data.configure(config)
    tokenizer = get_tokenizer(master.policy["tokenizer"])
    master.policy["generation"] = configure_generation_config(
        master.policy["generation"],
        tokenizer,
        has_refit_draft_weights=bool(master.policy["draft"]["enabled"]),
        trains_mtp=bool((master.policy.get("megatron_cfg") or {}).get("mtp_num_layers")),
    )
    dataset, val_dataset, task_to_env, val_task_to_env = setup_response_data(
        tokenizer, master.data, master.env
    )
    factory = stack.enter_context(_policy_factory(config, master))
    with converted_once(master.policy):
        made = setup(master, tokenizer, dataset, val_dataset, policy_factory=factory)
    policy, generation, _, _, loader, val_loader, loss_fn, logger, checkpointer, state, *rest = made
    carry_tokenizer(checkpointer, tokenizer)
    stack.enter_context(finalized(checkpointer))
    arguments = {
        "policy": policy,
        "policy_generation": generation,
        "val_dataloader": val_loader,
        "tokenizer": tokenizer,
        "task_to_env": task_to_env,
        "val_task_to_env": val_task_to_env,
        "loss_fn": loss_fn,
        "logger": logger,
        "checkpointer": checkpointer,
        "grpo_save_state": state,
        "master_config": rest[0],
    }
    teachers = ("teacher_worker_groups", "alias_to_group_alias")
    return arguments, loader, dict(zip(teachers, rest[1:], strict=True))


@contextmanager
def _policy_factory(config: Config, master: Any) -> Iterator[Any]:
    """How `setup()` makes the policy; for the local engine, its generation too."""
    if config.igrpo.engine == "nemo_rl_local":
        from igrpo_nemo.nemo.cpu import local_policy_factory

        with local_policy_factory(master) as factory:
            yield factory
    elif uses_data_plane(config):
        from nemo_rl.models.policy.tq_policy import TQPolicy

        yield lambda **arguments: TQPolicy(**arguments, dp_cfg=master.data_plane)
    else:
        yield None


def maps(
    config: Config, made: dict[str, Any], clock: StepClock
) -> tuple[TrainingMap, dict[str, Any]]:
    """What NeMo-RL's rollout and its validation are called with."""
    validation = made["val_task_to_env"]
    if not uses_data_plane(config):  # which keeps what its actor validates
        validation = ValidationMap(validation, config, clock)
    return TrainingMap(made["task_to_env"], config, clock), validation


def peak_training_memory(policy: Any) -> float | None:
    """Bytes that the fullest of the policy's workers has had on its GPU; None where there are no
    workers to ask, or where they do not say."""
    workers = getattr(policy, "worker_group", None)
    if workers is None:
        return None
    try:  # boundary to NeMo-RL's workers, whose answer is for the log alone
        found: Any = ray.get(workers.run_all_workers_single_data("get_gpu_info"))
    except RayTaskError:
        return None
    return max(each["peak_memory_allocated_mb"] for each in found) * 2**20

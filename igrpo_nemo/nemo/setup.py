"""NeMo-RL's own `setup()`, with the project's environment, data, loss, map and log in it.

registered environment and processor ─> data sets, environments ─> setup() ─> Made
Made ─ map, loader, loss, log ─> the trainer's arguments ─> Parts
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
from igrpo_nemo.nemo.resume import Earlier, carry_tokenizer, newest_step, save_last_step
from igrpo_nemo.nemo.rollout import SingleStageMap, TwoStageMap, ValidationMap
from igrpo_nemo.nemo.run_log import RunLog
from igrpo_nemo.nemo.seam import RolloutSpec, RunMap, StepClock
from igrpo_nemo.nemo.trainers import finished_steps, trainer
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
    task_to_env: RunMap
    earlier: Earlier


@dataclass(frozen=True, slots=True)
class Made:
    """What NeMo-RL made of the config: `setup()`'s return value, and the environments."""

    tokenizer: Any
    task_to_env: dict[str, Any]
    val_task_to_env: dict[str, Any]
    policy: Any
    generation: Any
    loader: Any
    val_loader: Any
    logger: Any
    checkpointer: Any
    state: Any
    master: Any
    teachers: Any
    aliases: Any


def set_up(opened: OpenedRun, folder: RunFolder, stack: ExitStack) -> Parts:
    """Everything up to the trainer's call; `stack` closes what it opens."""
    config = opened.config
    made = make(opened, stack)
    clock = StepClock(finished_steps(config, made.state))
    earlier = _resumed(folder, clock, made.master)
    loader = made.loader
    if draws_ahead(config):
        loader = LookaheadLoader(loader)
    task_to_env, val_task_to_env = maps(config, made, clock)
    if isinstance(loader, LookaheadLoader) and isinstance(task_to_env, TwoStageMap):
        task_to_env.prefetcher = Prefetcher(loader, clock, opened.total_steps)
    log = RunLog(
        made.logger,
        config,
        Tracker([JsonlSink(folder)]),
        clock,
        lambda: task_to_env.rollouts,
        conditioned=val_task_to_env.take if isinstance(val_task_to_env, ValidationMap) else list,
        peak_memory=lambda: peak_training_memory(made.policy),
        earlier=earlier,
    )
    arguments: dict[str, Any] = {
        "policy": made.policy,
        "policy_generation": made.generation,
        "val_dataloader": made.val_loader,
        "tokenizer": made.tokenizer,
        "loss_fn": build_loss(made.master.loss_fn, config, made.master.policy),
        "task_to_env": task_to_env,
        "val_task_to_env": val_task_to_env,
        "logger": log,
        "checkpointer": made.checkpointer,
        "grpo_save_state": made.state,
        "master_config": made.master,
    }
    run_trainer = trainer(
        config,
        opened.total_steps,
        loader,
        arguments,
        teacher_worker_groups=made.teachers,
        alias_to_group_alias=made.aliases,
    )

    def save_last() -> None:
        early = 0 < clock.finished < opened.total_steps
        unsaved = made.master.checkpointing["enabled"] and (
            newest_step(made.checkpointer) < clock.finished
        )
        if early and unsaved:
            save_last_step(arguments, loader, clock.finished)

    return Parts(run_trainer, save_last, log, clock, task_to_env, earlier)


def make(opened: OpenedRun, stack: ExitStack) -> Made:
    """NeMo-RL's data sets, environments and `setup()`."""
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
    policy, generation, _, _, loader, val_loader, _, logger, checkpointer, state, *rest = made
    carry_tokenizer(checkpointer, tokenizer)
    return Made(
        tokenizer,
        task_to_env,
        val_task_to_env,
        policy,
        generation,
        loader,
        val_loader,
        logger,
        checkpointer,
        state,
        *rest,
    )


@contextmanager
def _policy_factory(config: Config, master: Any) -> Iterator[Any]:
    """How `setup()` makes the policy; for the local engine, its generation too."""
    if config.igrpo.engine == "nemo_rl_local":
        from igrpo_nemo.nemo.cpu.setup import local_policy_factory

        with local_policy_factory(master) as factory:
            yield factory
    elif (master.data_plane or {}).get("enabled"):
        from nemo_rl.models.policy.tq_policy import TQPolicy

        yield lambda **arguments: TQPolicy(**arguments, dp_cfg=master.data_plane)
    else:
        yield None


def _resumed(folder: RunFolder, clock: StepClock, master: Any) -> Earlier:
    """Cuts the log behind the checkpoint that NeMo-RL found; what the run did before it."""
    folder.truncate_after(clock.finished if clock.finished else -1)
    if clock.finished:
        # NeMo-RL takes the first step of any epoch for the first of the run.
        master.grpo["val_at_start"] = False
    return Earlier.of(folder.path, clock.finished)


def draws_ahead(config: Config) -> bool:
    return config.feedback.two_stage and config.igrpo.draft_prefetch == "fused"


def maps(config: Config, made: Made, clock: StepClock) -> tuple[RunMap, dict[str, Any]]:
    """What NeMo-RL's rollout and its validation are called with."""
    weights = {name: w for name, w in config.igrpo.reward.model_dump().items() if w}
    spec = RolloutSpec(config.feedback, weights)
    validation = made.val_task_to_env
    if not config.feedback.two_stage:
        return SingleStageMap(made.task_to_env, spec, clock), validation
    if config.igrpo.val_draft_conditioned:
        validation = ValidationMap(validation, spec, clock)
    return TwoStageMap(made.task_to_env, spec, clock), validation


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

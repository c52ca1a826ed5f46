"""`igrpo train engine=nemo_rl`: the project's config through NeMo-RL's `setup()` and `grpo_train`.

config ─ problems, checks ─> MasterConfig ─> Ray, tokenizer, data, environments ─> setup()
       ─> our loss, marker map, loader, log ─> NeMo-RL's trainer, unmodified

With engine `nemo_rl_local` the model is the embedded engine's, in this process; the rest is the
same code.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import igrpo_nemo
from igrpo_nemo.config import Config, with_problems
from igrpo_nemo.config.launch_checks import check_launch
from igrpo_nemo.errors import UserError
from igrpo_nemo.run.folder import RunFolder
from igrpo_nemo.run.stop import StopFile
from igrpo_nemo.tracking import Tracker
from igrpo_nemo.tracking.tracker import JsonlSink

LOCAL_RAY_CPUS = 4
"""Places for actors, not cores: TransferQueue keeps three, and the others need one to start in."""


def train(config: Config) -> int:
    """Trains as configured, resuming NeMo-RL's newest checkpoint.

    Returns 0 when the last step is done, and when the time limit or the stop file ended training
    before; 1 when the trainer returned for neither reason, 70 if Ray has lost a node by then.
    Raises `UserError` for what cannot work, before anything is started, and `LostProcessError`
    where Ray lost a process of the run.
    """
    _prepare_environment(config)
    from igrpo_nemo.nemo.names import check_nemo_rl

    check_nemo_rl()
    from igrpo_nemo.nemo.seam import installed
    from igrpo_nemo.nemo.stop_request import StopRequest

    with RunFolder(config.logger.log_dir) as folder, ExitStack() as stack:
        opened = open_run(config, folder)
        folder.write_plan(opened.total_steps)
        stack.enter_context(_ray(opened.config))
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
    from igrpo_nemo.nemo.errors import LostProcessError, is_lost_process

    try:
        trainer()
    except Exception as error:
        if is_lost_process(error):
            raise LostProcessError(" ".join(str(error).split())[:1_000]) from error
        raise


@dataclass(frozen=True, slots=True)
class OpenedRun:
    """A config that is known to work, with its problems written down, and NeMo-RL's form of it."""

    config: Config
    master: Any
    num_problems: int
    total_steps: int


def open_run(config: Config, folder: RunFolder) -> OpenedRun:
    """Loads the problems, fills in what follows from their number, and checks everything."""
    from nemo_rl.algorithms.utils import get_tokenizer

    from igrpo_nemo.nemo.data import write_problems
    from igrpo_nemo.nemo.master_config import master_config, total_steps
    from igrpo_nemo.nemo.trainers import check_trainer
    from igrpo_nemo.run.core import prompt_builder
    from igrpo_nemo.run.folder import check_same_run
    from igrpo_nemo.run.problems import fitting_problems, training_problems, validation_problems
    from igrpo_nemo.run.tokenizer import load_tokenizer

    problems, validation = training_problems(config), validation_problems(config)
    config = _with_model_folder(config)
    load_tokenizer(config.policy.tokenizer.name)  # a clear error, where there is none
    tokenizer = get_tokenizer(config.to_dict()["policy"]["tokenizer"])
    prompts = prompt_builder(config, tokenizer)
    drop = config.igrpo.drop_overlong_prompts
    problems = fitting_problems(problems, prompts, drop_overlong=drop)
    validation = fitting_problems(validation, prompts, drop_overlong=drop)
    config = with_problems(config, len(problems))
    check_launch(config)
    check_trainer(config)
    check_same_run(folder.path, config.to_dict())
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


@dataclass
class Parts:
    """What NeMo-RL's trainer is called with, and what the run leaves behind."""

    run_trainer: Callable[[], None]
    save_last: Callable[[], None]
    log: Any
    clock: Any
    task_to_env: Any
    earlier: Any


def set_up(opened: OpenedRun, folder: RunFolder, stack: ExitStack) -> Parts:
    """NeMo-RL's own setup, with the project's environment, data, loss, map and log in it."""
    from nemo_rl.algorithms.grpo import setup
    from nemo_rl.algorithms.utils import get_tokenizer
    from nemo_rl.data.utils import setup_response_data
    from nemo_rl.models.generation import configure_generation_config

    from igrpo_nemo.nemo import data, environment
    from igrpo_nemo.nemo.converted_model import converted_once
    from igrpo_nemo.nemo.earlier import Earlier
    from igrpo_nemo.nemo.last_checkpoint import carry_tokenizer, newest_step, save_last_step
    from igrpo_nemo.nemo.loss import build_loss
    from igrpo_nemo.nemo.prefetch import LookaheadLoader, Prefetcher, StepClock
    from igrpo_nemo.nemo.run_log import RunLog
    from igrpo_nemo.nemo.short_circuit import ShortCircuit
    from igrpo_nemo.nemo.spec import SingleStageMap, TwoStageMap, TwoStageSpec
    from igrpo_nemo.nemo.trainers import finished_steps, trainer

    config, master = opened.config, opened.master
    environment.register()
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
    policy_factory = stack.enter_context(_policy_factory(config, master))
    with converted_once(master.policy):
        made = setup(master, tokenizer, dataset, val_dataset, policy_factory=policy_factory)
    (
        policy,
        generation,
        _,
        _,
        loader,
        val_loader,
        _,
        logger,
        checkpointer,
        state,
        master,
        teachers,
        aliases,
    ) = made

    carry_tokenizer(checkpointer, tokenizer)
    clock = StepClock(finished_steps(config, state))
    folder.truncate_after(clock.finished if clock.finished else -1)
    if clock.finished:
        # NeMo-RL takes the first step of any epoch for the first of the run.
        master.grpo["val_at_start"] = False
    earlier = Earlier.of(folder.path, clock.finished)
    reward = config.igrpo.reward
    spec = TwoStageSpec(
        feedback=config.feedback,
        weights={name: w for name, w in reward.model_dump().items() if w},
        short_circuit=ShortCircuit(
            config.igrpo.short_circuit, reward.best, config.igrpo.rank_truncated_last
        ),
    )
    if not spec.feedback.two_stage:
        task_to_env = SingleStageMap(task_to_env, spec, clock)
    else:
        prefetcher = None
        if config.igrpo.draft_prefetch == "fused":
            loader = LookaheadLoader(loader)
            prefetcher = Prefetcher(loader, clock, opened.total_steps)
        task_to_env = TwoStageMap(task_to_env, spec, clock, prefetcher)
    log = RunLog(
        logger,
        config,
        Tracker([JsonlSink(folder)]),
        clock,
        lambda: task_to_env.rollouts,
        earlier=earlier,
    )
    arguments: dict[str, Any] = {
        "policy": policy,
        "policy_generation": generation,
        "val_dataloader": val_loader,
        "tokenizer": tokenizer,
        "loss_fn": build_loss(master.loss_fn, config, master.policy),
        "task_to_env": task_to_env,
        "val_task_to_env": val_task_to_env,
        "logger": log,
        "checkpointer": checkpointer,
        "grpo_save_state": state,
        "master_config": master,
    }
    run_trainer = trainer(
        config,
        opened.total_steps,
        loader,
        arguments,
        teacher_worker_groups=teachers,
        alias_to_group_alias=aliases,
    )

    def save_last() -> None:
        early = clock.finished < opened.total_steps
        if early and master.checkpointing["enabled"] and newest_step(checkpointer) < clock.finished:
            save_last_step(arguments, loader, clock.finished)

    return Parts(run_trainer, save_last, log, clock, task_to_env, earlier)


def _prepare_environment(config: Config) -> None:
    """Variables that must be set before NeMo-RL is imported, and reach Ray's processes."""
    root = str(Path(igrpo_nemo.__file__).resolve().parents[1])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if root not in paths:
        # NeMo-RL's workers run in environments of their own and unpickle our loss and map there.
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, paths)])
    if config.igrpo.engine == "nemo_rl_local":
        os.environ["NEMO_RL_PY_EXECUTABLES_SYSTEM"] = "1"
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    elif config.policy.megatron_cfg and config.policy.megatron_cfg.get("enabled"):
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            raise UserError(
                "TORCH_CUDA_ARCH_LIST is not set, which Megatron needs: export "
                "TORCH_CUDA_ARCH_LIST=8.0 for A100, 9.0 for H100"
            )


@contextmanager
def _ray(config: Config) -> Iterator[None]:
    """NeMo-RL's own Ray start on a cluster; a small private one for the local engine.

    A Ray that runs already is used as it is, and left running.
    """
    import ray

    if ray.is_initialized():
        with _addressed():
            yield
        return
    if config.igrpo.engine == "nemo_rl":
        from nemo_rl.distributed.virtual_cluster import init_ray

        init_ray()
    else:
        ray.init(
            address="local",
            num_cpus=LOCAL_RAY_CPUS,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}},
        )
    try:
        with _addressed():
            yield
    finally:
        ray.shutdown()


@contextmanager
def _addressed() -> Iterator[None]:
    """Names this process's Ray in the environment: NeMo-RL looks one up by that, and otherwise
    fails where a machine runs two."""
    import ray

    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = before


def _with_model_folder(config: Config) -> Config:
    """Names the folder of the built-in small model, made and warmed up where it is missing."""
    if config.igrpo.model is None:
        return config
    if config.igrpo.engine == "nemo_rl":
        raise UserError("engine=nemo_rl trains a Hugging Face model: use model=hf")
    from igrpo_nemo.nemo.cpu.setup import with_small_model

    return with_small_model(config)


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


def _close_run(
    opened: OpenedRun, parts: Parts, folder: RunFolder, seconds: float, stopped: bool
) -> int:
    """The summary and, where the last step is done, the marker; the exit code.

    The summary is the whole run's; that of a finished run that was only asked for again stays.
    """
    from igrpo_nemo.nemo.earlier import summary_of
    from igrpo_nemo.nemo.errors import LostProcessError

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
        return LostProcessError.exit_code if _nodes_lost() else 1
    return 0


def _nodes_lost() -> bool:
    import ray

    return any(not node["Alive"] for node in ray.nodes())


def is_finished(opened: OpenedRun, steps: int, stopped: bool) -> bool:
    """Whether the last step is done. Under dynamic sampling steps draw several batches, so a run
    that nobody stopped may also end with its data."""
    if steps >= opened.total_steps:
        return True
    return opened.config.grpo.use_dynamic_sampling and not stopped

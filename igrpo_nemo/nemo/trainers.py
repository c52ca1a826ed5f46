"""NeMo-RL's three trainers, called with the same parts; the config says which.

grpo_train        one process rolls out and trains, step by step
grpo_train_sync   data_plane.enabled: an actor rolls out, rows travel through TransferQueue
async_grpo_train  grpo.async_grpo.enabled: an actor rolls out while the policy trains. It reads its
                  loader in another process, once, and waits for what never comes where reading or
                  rolling out fails there: a watchdog ends the run instead
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

from igrpo_nemo.config import Config
from igrpo_nemo.config.machines import is_async_training
from igrpo_nemo.errors import UserError
from igrpo_nemo.nemo import data
from igrpo_nemo.nemo.failure import Reporter, Watchdog
from igrpo_nemo.nemo.versions import entries


def uses_data_plane(config: Config) -> bool:
    return bool((config.data_plane or {}).get("enabled"))


def check_trainer(config: Config) -> None:
    """Raises `UserError` where the trainer's packages are missing."""
    if uses_data_plane(config) and importlib.util.find_spec("transfer_queue") is None:
        raise UserError(
            "data_plane.enabled=true needs the package TransferQueue, which NeMo-RL's container "
            "has: pip install TransferQueue, or set it to false"
        )


def finished_steps(config: Config, state: Any) -> int:
    """Steps before a resume; the asynchronous trainer counts no epochs."""
    return entries(state)["current_step" if is_async_training(config) else "total_steps"]


def trainer(
    config: Config, total_steps: int, loader: Any, arguments: dict[str, Any], **teachers: Any
) -> Callable[[], None]:
    """The trainer that the config asks for, ready to be called.

    A rollout that fails in another process fails the call with its own `RolloutError`.
    `teachers` are the asynchronous trainer's alone.
    """
    if is_async_training(config):
        return lambda: _train_asynchronously(config, total_steps, loader, arguments, teachers)
    if uses_data_plane(config):
        from nemo_rl.algorithms.grpo_sync import grpo_train_sync as grpo_train
    else:
        from nemo_rl.algorithms.grpo import grpo_train

    return lambda: grpo_train(**arguments, wrapped_dataloader=loader)


def _train_asynchronously(
    config: Config,
    total_steps: int,
    loader: Any,
    arguments: dict[str, Any],
    teachers: dict[str, Any],
) -> None:
    from nemo_rl.algorithms.grpo import async_grpo_train

    # It knows no epochs.
    entries(arguments["master_config"].grpo)["max_num_steps"] = total_steps
    if config.igrpo.engine == "nemo_rl_local":
        arguments["checkpointer"] = _WithoutBuffer(arguments["checkpointer"])
    watchdog = Watchdog()
    arguments["task_to_env"].report = watchdog.reporter
    endless: Any = EndlessLoader(loader, config, watchdog.reporter)
    age = (config.grpo.async_grpo or {})["max_trajectory_age_steps"]
    with watchdog():
        async_grpo_train(**arguments, **teachers, dataloader=endless, max_trajectory_age_steps=age)


class EndlessLoader:
    """A data loader that starts over: the run's steps end it, not its data.

    Where it arrives, the processor of the problems must know `config` too. `report` tells the run
    of what is raised there.
    """

    def __init__(self, inner: Any, config: Config, report: Reporter) -> None:
        self._inner = inner
        self._config = config
        self._report = report

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[Any]:
        with self._report.watching():
            while True:
                yield from self._inner

    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict()

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (self._inner, self._config, self._report)


def _arrive(inner: Any, config: Config, report: Reporter) -> EndlessLoader:
    data.configure(config)
    return EndlessLoader(inner, config, report)


class _WithoutBuffer:
    """A checkpointer with which the trainer begins with an empty replay buffer.

    With a full one it trains a step at once. Where that takes less time than its collector needs to
    start, as with a small model on one machine, the step after it is never sampled.
    """

    def __init__(self, checkpointer: Any) -> None:
        self._checkpointer = checkpointer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpointer, name)

    def get_latest_checkpoint_path(self) -> None:
        """Where the buffer would be looked for."""

"""NeMo-RL's three trainers, called with the same parts; the config says which.

grpo_train        one process rolls out and trains, step by step
grpo_train_sync   data_plane.enabled: an actor rolls out, rows travel through TransferQueue
async_grpo_train  grpo.async_grpo.enabled: an actor rolls out while the policy trains
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from igrpo_nemo.config import Config
from igrpo_nemo.config.machines import is_async_training
from igrpo_nemo.errors import UserError
from igrpo_nemo.nemo.failure import RolloutError
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
        from igrpo_nemo.nemo.trainers.asynchronous import asynchronous_trainer

        return asynchronous_trainer(config, total_steps, loader, arguments, **teachers)
    if uses_data_plane(config):
        return lambda: _train_through_data_plane(arguments, loader)
    from nemo_rl.algorithms.grpo import grpo_train

    return lambda: grpo_train(**arguments, wrapped_dataloader=loader)


def _train_through_data_plane(arguments: dict[str, Any], loader: Any) -> None:
    from nemo_rl.algorithms.grpo_sync import grpo_train_sync
    from ray.exceptions import RayTaskError

    try:
        grpo_train_sync(**arguments, wrapped_dataloader=loader)
    except RayTaskError as error:
        # The actor's traceback is Ray's message; the error itself says more in a line.
        if isinstance(error.cause, RolloutError):
            raise error.cause from None
        raise

"""Where NeMo-RL calls our rollout: three modules, two names, put back afterwards.

`grpo_train` has no hook for rollouts. While the seam is installed, the names
`run_multi_turn_rollout` and `run_async_multi_turn_rollout` in the modules that call them dispatch
on the type of `task_to_env`: a `TwoStageMap` gets the two-stage rollout, anything else, validation
included, NeMo-RL's own with the arguments as they came.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from igrpo_nemo.errors import UserError
from igrpo_nemo.nemo.spec import TwoStageMap

SUPPORTED = (0, 7)
"""The NeMo-RL minor version whose sources this was read and tested against."""

ROLLOUTS = ("run_multi_turn_rollout", "run_async_multi_turn_rollout")

CALLERS = {
    "nemo_rl.algorithms.grpo": ROLLOUTS,
    "nemo_rl.algorithms.async_utils.trajectory_collector": ROLLOUTS[1:],
    "nemo_rl.experience.sync_rollout_actor": ROLLOUTS,
}
"""Modules that call the rollouts by these names: trainer, async collector, data-plane actor."""

NEEDED: dict[str, tuple[str, ...]] = {
    "nemo_rl.experience.rollouts:run_multi_turn_rollout": (
        "policy_generation", "input_batch", "tokenizer", "task_to_env", "max_seq_len",
        "max_rollout_turns", "greedy",
    ),
    "nemo_rl.experience.rollouts:run_async_multi_turn_rollout": (
        "policy_generation", "input_batch", "tokenizer", "task_to_env", "max_seq_len",
        "max_rollout_turns", "greedy",
    ),
    "nemo_rl.experience.rollouts:generate_responses": (
        "policy_generation", "generation_input_data", "batch", "tokenizer", "input_lengths",
        "greedy",
    ),
    "nemo_rl.experience.rollouts:generate_responses_async": (
        "policy_generation", "generation_input_data", "batch", "tokenizer", "input_lengths",
        "greedy",
    ),
    "nemo_rl.experience.rollouts:calculate_rewards": ("batch", "task_to_env"),
    "nemo_rl.algorithms.grpo:setup": (
        "master_config", "tokenizer", "dataset", "val_dataset", "policy_factory",
    ),
    "nemo_rl.algorithms.grpo:grpo_train": (
        "policy", "policy_generation", "wrapped_dataloader", "val_dataloader", "tokenizer",
        "loss_fn", "task_to_env", "val_task_to_env", "logger", "checkpointer", "grpo_save_state",
        "master_config",
    ),
    "nemo_rl.algorithms.grpo:async_grpo_train": (
        "policy", "policy_generation", "dataloader", "task_to_env", "val_task_to_env",
        "max_trajectory_age_steps",
    ),
    "nemo_rl.algorithms.grpo:MasterConfig": (),
    "nemo_rl.algorithms.grpo:_should_use_async_rollouts": ("master_config",),
    "nemo_rl.algorithms.utils:get_tokenizer": ("tokenizer_config",),
    "nemo_rl.algorithms.loss:ClippedPGLossFn": ("cfg",),
    "nemo_rl.algorithms.loss.interfaces:LossInputType": (),
    "nemo_rl.data.utils:setup_response_data": ("tokenizer", "data_config", "env_configs"),
    "nemo_rl.data.processors:register_processor": ("processor_name", "processor_function"),
    "nemo_rl.data.datasets.raw_dataset:RawDataset": (),
    "nemo_rl.distributed.batched_data_dict:BatchedDataDict": (),
    "nemo_rl.distributed.model_utils:get_next_token_logprobs_from_logits": (
        "input_ids", "next_token_logits", "vocab_parallel_rank", "vocab_parallel_group",
        "context_parallel_group", "sampling_params", "chunk_size",
    ),
    "nemo_rl.distributed.model_utils:ChunkedDistributedEntropy": (),
    "nemo_rl.distributed.ray_actor_environment_registry:ACTOR_ENVIRONMENT_REGISTRY": (),
    "nemo_rl.distributed.virtual_cluster:PY_EXECUTABLES": (),
    "nemo_rl.distributed.virtual_cluster:init_ray": (),
    "nemo_rl.environments.interfaces:EnvironmentInterface": (),
    "nemo_rl.environments.utils:register_env": ("env_name", "actor_class_fqn"),
    "nemo_rl.models.generation:configure_generation_config": ("config", "tokenizer"),
    "nemo_rl.models.generation.interfaces:GenerationInterface": (),
    "nemo_rl.models.policy.interfaces:ColocatablePolicyInterface": (),
}  # fmt: skip
"""Every name of NeMo-RL that this package stands on, with the parameters it passes."""

_lock = threading.RLock()
_originals: dict[tuple[str, str], Callable[..., Any]] = {}
_users = 0


def check_nemo_rl() -> None:
    """Raises `UserError` where NeMo-RL is missing or differs from what this package stands on."""
    try:
        version = importlib.import_module("nemo_rl.package_info").VERSION
    except ImportError as error:
        raise UserError(
            f"NeMo-RL cannot be imported ({error}): use its 0.7.0 container, or put the source "
            "tree of v0.7.0 on PYTHONPATH; docs/install.md says how"
        ) from error
    if tuple(version[:2]) != SUPPORTED:
        found = ".".join(str(part) for part in version[:3])
        raise UserError(
            f"NeMo-RL {found} is installed, but igrpo-nemo needs "
            f"{SUPPORTED[0]}.{SUPPORTED[1]}.x: use the container of v0.7.0"
        )
    differences = [d for path, names in NEEDED.items() if (d := _difference(path, names))]
    for module, names in CALLERS.items():
        differences += [
            f"{module} has no {name}"
            for name in names
            if not hasattr(importlib.import_module(module), name)
        ]
    if differences:
        raise UserError(f"this NeMo-RL differs from v0.7.0: {'; '.join(differences)}")


def _difference(path: str, parameters: tuple[str, ...]) -> str | None:
    module_name, _, name = path.partition(":")
    try:
        value = getattr(importlib.import_module(module_name), name, None)
    except ImportError as error:
        return f"{module_name} cannot be imported ({error})"
    if value is None:
        return f"{module_name} has no {name}"
    if not parameters:
        return None
    accepted = inspect.signature(value).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
        return None
    missing = [parameter for parameter in parameters if parameter not in accepted]
    return f"{module_name}.{name} takes no {', '.join(missing)}" if missing else None


def install() -> None:
    """Installs the seam in this process; nested calls count, `uninstall` undoes one of them."""
    global _users
    with _lock:
        _users += 1
        if _users > 1:
            return
        for module_name, names in CALLERS.items():
            module = importlib.import_module(module_name)
            for name in names:
                original = getattr(module, name)
                _originals[module_name, name] = original
                setattr(module, name, _dispatching(original, name))


def uninstall() -> None:
    """Undoes one `install`; the last one puts NeMo-RL's own functions back."""
    global _users
    with _lock:
        _users -= 1
        if _users:
            return
        for (module_name, name), original in _originals.items():
            setattr(importlib.import_module(module_name), name, original)
        _originals.clear()


@contextmanager
def installed() -> Iterator[None]:
    """The seam, for the duration of a `with` block."""
    install()
    try:
        yield
    finally:
        uninstall()


def _dispatching(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if not isinstance(given["task_to_env"], TwoStageMap):
            return original(*args, **kwargs)
        from igrpo_nemo.nemo import rollout

        if name == ROLLOUTS[0]:
            return rollout.two_stage_rollout(**given)
        return rollout.two_stage_rollout_async(**given)

    return dispatch

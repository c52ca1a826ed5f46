"""Where NeMo-RL 0.7 and its main (7ea279abf) differ: the rest of this package does not know which.

    0.7                                          main
    sections and the saved state are dicts       objects with attributes
    run_async_multi_turn_rollout per problem     run_async_multi_turn_rollout_groups for all
    components of a reward: reward1, reward2     reward/NAME, from a dict
    finalize_checkpoint                          begin_finalization, in a thread

Told by what is there, never by the version: main calls itself 0.6.0. NeMo-RL is imported when a
function needs it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def entries(section: Any) -> dict[str, Any]:
    """The values of a section or saved state by name; what is set or removed here is so there."""
    return section if isinstance(section, dict) else vars(section)


def required(values: dict[str, Any]) -> None:
    """Adds to a config what only main wants: its validation's sampling, which it insists on being
    that of training."""
    from nemo_rl.models.generation.interfaces import GenerationConfig

    generation = values["policy"]["generation"]
    for name in ("temperature", "top_p", "top_k"):
        if f"val_{name}" in GenerationConfig.__annotations__:
            generation.setdefault(f"val_{name}", generation[name])


def component_key(number: int, name: str) -> str:
    """Under which a batch has the component of a reward: `number` counts from 1."""
    from nemo_rl.algorithms.utils import get_gdpo_reward_component_keys

    named = f"reward/{name}"
    return named if get_gdpo_reward_component_keys({named: 0}) else f"reward{number}"


def component_rewards(columns: Mapping[str, torch.Tensor]) -> Any:
    """What an environment returns for several components, given as [B] by name."""
    keyed = {component_key(n, name): c for n, (name, c) in enumerate(columns.items(), start=1)}
    named = any("/" in key for key in keyed)
    return keyed if named else torch.stack(list(keyed.values()), dim=1)


async def rolled_out_in_groups(
    arguments: Mapping[str, Any],
    roll_out: Callable[[Callable[..., Any], Mapping[str, Any]], tuple[Any, dict[str, Any]]],
) -> AsyncIterator[Any]:
    """Main's call for all problems of a batch as 0.7's calls for one each: every problem in a
    thread of its own, and handed on as soon as it is done.

    `roll_out` gets NeMo-RL's function for one problem and its arguments.
    """
    from nemo_rl.experience import rollouts

    one = {name: value for name, value in arguments.items() if name != "num_generations"}
    batch, size = one["input_batch"], arguments["num_generations"]
    count, loop = batch.size // size, asyncio.get_running_loop()
    pool = ThreadPoolExecutor(count, thread_name_prefix="problem")

    async def group(index: int) -> Any:
        rows = batch.slice(index * size, (index + 1) * size)
        given = one | {"input_batch": rows}
        done = await loop.run_in_executor(
            pool, roll_out, rollouts.run_async_multi_turn_rollout, given
        )
        return rollouts.RolloutGroupResult(index, *done)  # type: ignore[attr-defined]

    try:
        for each in asyncio.as_completed([group(index) for index in range(count)]):
            yield await each
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def before_finalization(checkpointer: Any, act: Callable[[Any], None]) -> None:
    """Has `act` called with a checkpoint's folder when all else is in it, before it is renamed."""

    def acting(finish: Callable[..., Any]) -> Callable[..., Any]:
        def finish_after(checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
            act(checkpoint_path)
            return finish(checkpoint_path, *args, **kwargs)

        return finish_after

    for name in ("finalize_checkpoint", "begin_finalization"):
        if hasattr(checkpointer, name):
            setattr(checkpointer, name, acting(getattr(checkpointer, name)))


def finalized(checkpointer: Any) -> AbstractContextManager[Any]:
    """Behind it no checkpoint is left half renamed, whatever is raised inside."""
    return checkpointer if hasattr(checkpointer, "__exit__") else nullcontext()


def newest_checkpoint(checkpointer: Any) -> str | None:
    """The folder of the newest checkpoint, one that is being renamed included."""
    if hasattr(checkpointer, "finalize_pending"):
        checkpointer.finalize_pending()
    return checkpointer.get_latest_checkpoint_path()

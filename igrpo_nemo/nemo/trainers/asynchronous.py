"""NeMo-RL's `async_grpo_train`: rolled out in an actor, data without an end, errors that reach us.

It reads its loader in another process, once, and waits for what never comes where reading or
rolling out fails there: `watchdog` ends the run instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from igrpo_nemo.config import Config
from igrpo_nemo.nemo import data
from igrpo_nemo.nemo.failure import Reporter
from igrpo_nemo.nemo.trainers.watchdog import Watchdog
from igrpo_nemo.nemo.versions import entries


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


def asynchronous_trainer(
    config: Config, total_steps: int, loader: Any, arguments: dict[str, Any], **teachers: Any
) -> Callable[[], None]:
    """The trainer, ready to be called; it fails with the `RolloutError` of its actors."""
    from nemo_rl.algorithms.grpo import async_grpo_train

    # It knows no epochs.
    entries(arguments["master_config"].grpo)["max_num_steps"] = total_steps
    if config.igrpo.engine == "nemo_rl_local":
        arguments["checkpointer"] = _WithoutBuffer(arguments["checkpointer"])

    def train() -> None:
        watchdog = Watchdog()
        arguments["task_to_env"].report = watchdog.reporter
        endless: Any = EndlessLoader(loader, config, watchdog.reporter)
        age = (config.grpo.async_grpo or {})["max_trajectory_age_steps"]
        with watchdog():
            async_grpo_train(
                **arguments, **teachers, dataloader=endless, max_trajectory_age_steps=age
            )

    return train

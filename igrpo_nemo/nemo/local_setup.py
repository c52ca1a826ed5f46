"""The embedded engine's model in NeMo-RL's `setup()`, which builds generation and policy apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from igrpo_nemo.config import Config
from igrpo_nemo.local.small_policy import small_policy_folder
from igrpo_nemo.nemo.local_policy import LocalPolicy


@contextmanager
def local_policy_factory(master: Any) -> Iterator[Callable[..., LocalPolicy]]:
    """A `policy_factory` for `setup()`. Meanwhile NeMo-RL's name for vLLM means the same object.

    NeMo-RL makes the colocated engine before the policy, to have the GPU to itself; here one object
    is both, and must know the checkpoint's paths, which only the policy is given. So it is made at
    the first of the two calls, and loads at the second.
    """
    from nemo_rl.algorithms import grpo

    made: list[LocalPolicy] = []

    def generation(cluster: Any, config: Any) -> LocalPolicy:
        made.append(
            LocalPolicy(
                master.policy,
                seed=master.grpo["seed"],
                init_reference_model=master.loss_fn.reference_policy_kl_penalty > 0,
            )
        )
        return made[0]

    def policy(**arguments: Any) -> LocalPolicy:
        [instance] = made
        if arguments["weights_path"] is not None:
            instance.restore(arguments["weights_path"], arguments["optimizer_path"])
        return instance

    original = grpo.VllmGeneration
    grpo.VllmGeneration = generation  # type: ignore[assignment, misc]
    try:
        yield policy
    finally:
        grpo.VllmGeneration = original  # type: ignore[misc]


def with_small_model(config: Config) -> Config:
    """The config with the folder of its built-in small model, warmed up where it is missing."""

    def report(step: int, steps: int, loss: float) -> None:
        if step == 1:
            print(f"warming the small model up in {steps} steps (once; cached for later runs)")

    folder = str(small_policy_folder(config, report).folder)
    config = config.replaced("policy", model_name=folder)
    return config.replaced("policy.tokenizer", name=folder)

"""The CPU double: the embedded engine's model behind NeMo-RL's policy and generation interfaces.

    NeMo-RL's loop, loss and checkpoints ─> policy ─> generation, in this process or in an actor

For laptops and tests (`engine=nemo_rl_local`); nothing of it runs on a cluster. NeMo-RL's `setup()`
builds machines, generation and policy; here it gets these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from igrpo_nemo.config import Config
from igrpo_nemo.local.warmup import small_policy
from igrpo_nemo.nemo.cpu.generation import RemoteGeneration
from igrpo_nemo.nemo.cpu.policy import DataPlanePolicy, LocalPolicy
from igrpo_nemo.nemo.versions import entries


@contextmanager
def local_policy_factory(master: Any) -> Iterator[Callable[..., LocalPolicy]]:
    """A `policy_factory` for `setup()`, whose names for vLLM and for the cluster mean the local
    engine's meanwhile."""
    from nemo_rl.algorithms import grpo

    double = _Double(master)
    names = {"VllmGeneration": double.generation, "RayVirtualCluster": _ThisMachine}
    originals = {name: getattr(grpo, name) for name in names}
    vars(grpo).update(names)
    try:
        yield double.restored_policy
    finally:
        vars(grpo).update(originals)
        double.close()


class _Double:
    """One object is policy and generation; apart, in an actor, the generation of the trainers that
    roll out in actors of their own.

    NeMo-RL makes a colocated engine before the policy, to have the GPU to itself, and gives the
    checkpoint's paths to the policy alone: it is made at whichever call comes first, and loads at
    the second.
    """

    def __init__(self, master: Any) -> None:
        self._master = master
        self._data_plane = (master.data_plane or {}).get("enabled", False)
        apart = self._data_plane or not master.policy["generation"]["colocated"]["enabled"]
        self._seed = entries(master.grpo)["seed"]
        self._remote = RemoteGeneration(master.policy, self._seed) if apart else None

    def generation(self, cluster: Any, config: Any) -> LocalPolicy | RemoteGeneration:
        return self._remote or self._policy

    def restored_policy(self, **arguments: Any) -> LocalPolicy:
        if arguments["weights_path"] is not None:
            self._policy.restore(arguments["weights_path"], arguments["optimizer_path"])
        return self._policy

    @cached_property
    def _policy(self) -> LocalPolicy:
        master = self._master
        options: dict[str, Any] = {
            "seed": self._seed,
            "init_reference_model": master.loss_fn.reference_policy_kl_penalty > 0,
            "remote": self._remote,
        }
        if not self._data_plane:
            return LocalPolicy(master.policy, **options)
        from nemo_rl.data_plane.adapters import transfer_queue

        # Else NeMo-RL has Ray install TransferQueue for its actors, as its own package requires it.
        transfer_queue._TQ_RUNTIME_ENV_PATCHED = True
        return DataPlanePolicy(master.policy, **options, dp_cfg=master.data_plane)

    def close(self) -> None:
        """Ends the actors that this process started."""
        made = self.__dict__.get("_policy")
        for each in (self._remote, made):
            if each is not None:
                each.shutdown()


class _ThisMachine:
    """In the place of NeMo-RL's cluster of GPUs: this process, which reserves nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what NeMo-RL's takes."""

    def get_master_address_and_port(self) -> tuple[str, int]:
        return "127.0.0.1", 0

    def world_size(self) -> int:
        return 1

    def shutdown(self) -> None:
        """Nothing was reserved."""


def with_small_model(config: Config) -> Config:
    """The config with the folder of its built-in small model, warmed up where it is missing."""

    def report(step: int, steps: int, loss: float) -> None:
        if step == 1:
            print(f"warming the small model up in {steps} steps (once; cached for later runs)")

    folder = str(small_policy(config, report).folder)
    config = config.replaced("policy", model_name=folder)
    return config.replaced("policy.tokenizer", name=folder)

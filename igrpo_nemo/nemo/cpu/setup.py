"""The embedded engine's model in NeMo-RL's `setup()`, which builds machines, generation, policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from igrpo_nemo.config import Config
from igrpo_nemo.local.warmup import small_policy
from igrpo_nemo.nemo.cpu.policy import LocalPolicy
from igrpo_nemo.nemo.cpu.remote import RemoteGeneration


@contextmanager
def local_policy_factory(master: Any) -> Iterator[Callable[..., LocalPolicy]]:
    """A `policy_factory` for `setup()`, whose names for vLLM and for the cluster mean the local
    engine's meanwhile."""
    from nemo_rl.algorithms import grpo

    colocated = master.policy["generation"]["colocated"]["enabled"]
    data_plane = (master.data_plane or {}).get("enabled", False)
    make = _Together(master) if colocated and not data_plane else _Apart(master, data_plane)
    originals = grpo.VllmGeneration, grpo.RayVirtualCluster
    grpo.VllmGeneration = make.generation  # type: ignore[assignment, misc]
    grpo.RayVirtualCluster = _ThisMachine  # type: ignore[assignment, misc]
    try:
        yield make.policy
    finally:
        grpo.VllmGeneration, grpo.RayVirtualCluster = originals  # type: ignore[misc]
        make.close()


class _Together:
    """One object is policy and generation.

    NeMo-RL makes the colocated engine before the policy, to have the GPU to itself; here one object
    is both, and must know the checkpoint's paths, which only the policy is given. So it is made at
    the first of the two calls, and loads at the second.
    """

    def __init__(self, master: Any) -> None:
        self._master = master
        self._made: list[LocalPolicy] = []

    def generation(self, cluster: Any, config: Any) -> LocalPolicy:
        self._made.append(LocalPolicy(self._master.policy, **_options(self._master)))
        return self._made[0]

    def policy(self, **arguments: Any) -> LocalPolicy:
        [instance] = self._made
        return _restored(instance, arguments)

    def close(self) -> None:
        """Nothing outlives the process's own objects."""


class _Apart:
    """Generation in an actor, for the trainers that roll out in actors of their own."""

    def __init__(self, master: Any, data_plane: bool) -> None:
        self._master = master
        self._data_plane = data_plane
        self._policy: LocalPolicy | None = None
        self._remote = RemoteGeneration(master.policy, seed=master.grpo["seed"])

    def generation(self, cluster: Any, config: Any) -> RemoteGeneration:
        return self._remote

    def policy(self, **arguments: Any) -> LocalPolicy:
        options = {**_options(self._master), "remote": self._remote}
        self._policy = self._make_policy(options)
        return _restored(self._policy, arguments)

    def _make_policy(self, options: dict[str, Any]) -> LocalPolicy:
        if not self._data_plane:
            return LocalPolicy(self._master.policy, **options)
        from nemo_rl.data_plane.adapters import transfer_queue

        from igrpo_nemo.nemo.cpu.data_plane import DataPlanePolicy

        # Else NeMo-RL has Ray install TransferQueue for its actors, as its own package requires it.
        transfer_queue._TQ_RUNTIME_ENV_PATCHED = True
        return DataPlanePolicy(self._master.policy, **options, dp_cfg=self._master.data_plane)

    def close(self) -> None:
        """Ends the actors that this process started."""
        self._remote.shutdown()
        if self._policy is not None:
            self._policy.shutdown()


def _options(master: Any) -> dict[str, Any]:
    reference = master.loss_fn.reference_policy_kl_penalty > 0
    return {"seed": master.grpo["seed"], "init_reference_model": reference}


def _restored(policy: LocalPolicy, arguments: Any) -> LocalPolicy:
    if arguments["weights_path"] is not None:
        policy.restore(arguments["weights_path"], arguments["optimizer_path"])
    return policy


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

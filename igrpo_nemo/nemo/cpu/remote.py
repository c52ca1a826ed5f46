"""The embedded engine's sampler in a Ray actor: generation apart from training, on one machine.

    LocalPolicy ─ weights, version ─> LocalGenerationActor <─ generate ─ RemoteGeneration (a handle)

NeMo-RL's asynchronous trainer and its data plane roll out in actors of their own. What they are
given of the generation must travel there, which a model in this process cannot.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import ray
import torch
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.models.generation.interfaces import GenerationInterface

from igrpo_nemo.local.model import open_policy
from igrpo_nemo.local.sampler import Sampler
from igrpo_nemo.nemo.cpu.generation import LocalGeneration, sampling_params

CONCURRENT_REQUESTS = 4_096


class LocalGenerationWorker:
    """The model that samples. It answers nothing before it has got weights: what the folder holds
    is not what a resumed run continues with.

    `config` is NeMo-RL's `policy` section.
    """

    def __init__(self, config: Mapping[str, Any], seed: int) -> None:
        torch.set_num_threads(1)
        policy = open_policy(
            config["model_name"],
            precision=config["precision"],
            chat_template=config["tokenizer"].get("chat_template"),
        )
        self._model = policy.model
        self._generation = LocalGeneration(
            Sampler(
                policy.model, policy.tokenizer, max_model_len=config["max_total_sequence_length"]
            ),
            sampling_params(config["generation"]),
            seed=seed,
            pad_token_id=config["generation"]["_pad_token_id"],
        )
        self._ready = asyncio.Event()

    async def load(self, weights: Mapping[str, torch.Tensor], version: int) -> bool:
        """Takes over the weights after `version` updates, between two calls of the sampler."""

        def load_weights() -> None:
            self._model.load_state_dict(weights)

        await asyncio.to_thread(self._generation.change_weights, load_weights, version)
        self._ready.set()
        return True

    async def generate(self, data: Any, greedy: bool) -> BatchedDataDict:
        """NeMo-RL's `generate`."""
        await self._ready.wait()
        return await asyncio.to_thread(self._generation.generate, data, greedy)

    async def generate_one(self, data: Any, greedy: bool) -> BatchedDataDict:
        """The one result of NeMo-RL's `generate_async`."""
        await self._ready.wait()
        [(_, result)] = [each async for each in self._generation.generate_async(data, greedy)]
        return result


_ACTOR_OPTIONS: dict[str, Any] = {"num_cpus": 0, "max_concurrency": CONCURRENT_REQUESTS}

LocalGenerationActor = ray.remote(**_ACTOR_OPTIONS)(LocalGenerationWorker)


class RemoteGeneration(GenerationInterface):
    """NeMo-RL's generation interface in front of the actor; travels to other processes.

    A refit is the policy's doing: it calls `receive`, and NeMo-RL's own two halves of it have
    nothing left to do.
    """

    def __init__(self, config: Mapping[str, Any], *, seed: int) -> None:
        self.cfg = config["generation"]
        self.version = 0
        self._actor: Any = LocalGenerationActor.remote(dict(config), seed)

    def advance(self) -> None:
        """To be called after a policy update; the actor learns of it with the weights."""
        self.version += 1

    def receive(self, weights: Mapping[str, torch.Tensor]) -> list[ray.ObjectRef]:
        """Sends the policy's weights; the references are done when the actor has them."""
        copies = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
        return [self._actor.load.remote(copies, self.version)]

    def generate(self, data: Any, greedy: bool = False) -> BatchedDataDict:
        return ray.get(self._actor.generate.remote(data, greedy))

    async def generate_async(
        self, data: Any, greedy: bool = False
    ) -> AsyncGenerator[tuple[int, BatchedDataDict], None]:
        yield 0, await self._actor.generate_one.remote(data, greedy)

    def prepare_for_generation(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def finish_generation(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def prepare_refit_info(self, state_dict_info: Any = None) -> None:
        """Nothing to prepare."""

    def init_collective(self, *args: Any, **kwargs: Any) -> list[ray.ObjectRef]:
        return []

    def update_weights_via_ipc_zmq(self) -> list[ray.ObjectRef]:
        return []

    def update_weights_from_collective(self) -> list[ray.ObjectRef]:
        return []

    def shutdown(self) -> bool:
        ray.kill(self._actor)
        return True

"""The embedded engine's sampler behind NeMo-RL's generation interface, here or in a Ray actor.

    generate(batch) ──────────> one call of the sampler for all rows
    generate_async(one row) ──> collected with the others that wait, then one call for all of them
    LocalPolicy ─ weights, version ─> LocalGenerationActor <─ both ─ RemoteGeneration (a handle)

A draw is named by (seed, policy version, prompt, how often that prompt was drawn under it), so it
does not depend on what else is in a batch, and a resumed run repeats it. NeMo-RL's asynchronous
trainer and its data plane roll out in actors of their own: what they are given of the generation
must travel there, which a model in this process cannot.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
import torch
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.models.generation.interfaces import GenerationInterface

from igrpo_nemo.local.model import LoadedPolicy, open_policy
from igrpo_nemo.local.sampler import Sampler, SampleRequest, SamplingParams
from igrpo_nemo.types import Completion


class OneMachine:
    """NeMo-RL's calls that have nothing to do where no weights and no memory move between GPUs."""

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to load, free, move or print."""

    def _done(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def _no_transfers(self, *args: Any, **kwargs: Any) -> list[ray.ObjectRef]:
        return []

    prepare_for_generation = finish_generation = _done
    prepare_for_training = finish_training = prepare_for_lp_inference = _nothing
    offload_before_refit = offload_after_refit = print_node_ip_and_gpu_id = _nothing
    prepare_refit_info = _nothing
    init_collective = update_weights_via_ipc_zmq = update_weights_from_collective = _no_transfers


class LocalGeneration:
    """Samples with the policy's current weights. `version` counts its updates.

    `config` is NeMo-RL's `policy` section.
    """

    def __init__(self, policy: LoadedPolicy, config: Mapping[str, Any], seed: int) -> None:
        self._sampler = Sampler(
            policy.model, policy.tokenizer, max_model_len=config["max_total_sequence_length"]
        )
        self._params = _sampling_params(config["generation"])
        self._seed = seed
        self._pad_token_id = config["generation"]["_pad_token_id"]
        self._drawn: Counter[str] = Counter()
        self._waiting: list[tuple[tuple[int, ...], bool, asyncio.Future[Completion]]] = []
        self._pump: asyncio.Task[None] | None = None
        # Sampling and a change of weights exclude each other where they come from two threads.
        self.weights = threading.Lock()
        self.version = 0

    def change_version(self, version: int) -> None:
        """To be called after a policy update: draws are counted anew."""
        if version != self.version:
            self._drawn.clear()
        self.version = version

    def generate(self, data: Any, greedy: bool) -> BatchedDataDict:
        """NeMo-RL's `generate`: `input_ids` right-padded, `input_lengths`; one row each."""
        prompts = [
            tuple(row[:length].tolist())
            for row, length in zip(data["input_ids"], data["input_lengths"].tolist(), strict=True)
        ]
        return self._output(prompts, self._sample(prompts, greedy, together=True))

    async def generate_async(
        self, data: Any, greedy: bool = False
    ) -> AsyncGenerator[tuple[int, BatchedDataDict], None]:
        """NeMo-RL's `generate_async`: one row, yielded when it is done.

        A caller that is cancelled leaves the queue; what is already being decoded ends on its own.
        """
        [length] = data["input_lengths"].tolist()
        prompt_ids = tuple(data["input_ids"][0, :length].tolist())
        answer: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting.append((prompt_ids, greedy, answer))
        if self._pump is None or self._pump.done():
            self._pump = asyncio.ensure_future(self._serve())
        yield 0, self._output([prompt_ids], [await answer])

    async def _serve(self) -> None:
        """Answers what waits, in batches, until nothing does."""
        while True:
            # Lets every coroutine that is about to ask do so first.
            await asyncio.sleep(0.001)
            waiting, self._waiting = self._waiting, []
            waiting = [each for each in waiting if not each[2].done()]
            if not waiting:
                return
            for greedy in {greedy for _, greedy, _ in waiting}:
                batch = [each for each in waiting if each[1] is greedy]
                try:
                    prompts = [prompt for prompt, *_ in batch]
                    found: Any = await asyncio.to_thread(self._sample, prompts, greedy)
                except Exception as error:  # every waiting caller must learn of it
                    found = [error] * len(batch)
                for (*_, answer), each in zip(batch, found, strict=True):
                    if not answer.done():
                        failed = isinstance(each, Exception)
                        (answer.set_exception if failed else answer.set_result)(each)

    def _sample(
        self, prompts: Sequence[tuple[int, ...]], greedy: bool, *, together: bool = False
    ) -> list[Completion]:
        """A completion per prompt. `together`: equal prompts share one prefill, and a name."""
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows_of.setdefault(prompt, []).append(row)
        params = replace(self._params, temperature=0.0) if greedy else self._params
        requests, owners = [], []
        with self.weights:
            for prompt, rows in rows_of.items():
                digest = hashlib.sha256(repr(prompt).encode()).hexdigest()[:16]
                for share in [rows] if together else [[row] for row in rows]:
                    key = f"{self._seed}/{self.version}/{digest}/{self._drawn[digest]}"
                    self._drawn[digest] += len(share)
                    requests.append(SampleRequest(prompt, len(share), key))
                    owners += share
            sampled = self._sampler.sample(requests, params)
        completions = [completion for of_request in sampled for completion in of_request]
        by_row = dict(zip(owners, completions, strict=True))
        return [by_row[row] for row in range(len(prompts))]

    def _output(
        self, prompts: Sequence[tuple[int, ...]], completions: Sequence[Completion]
    ) -> BatchedDataDict:
        """NeMo-RL's generation output, right-padded."""
        lengths = [len(completion.token_ids) for completion in completions]
        totals = [len(p) + n for p, n in zip(prompts, lengths, strict=True)]
        output_ids = torch.full((len(prompts), max(totals)), self._pad_token_id)
        logprobs = torch.zeros((len(prompts), max(totals)))
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            output_ids[row, : totals[row]] = torch.tensor([*prompt, *completion.token_ids])
            logprobs[row, len(prompt) : totals[row]] = torch.tensor(completion.logprobs)
        return BatchedDataDict(
            {
                "output_ids": output_ids,
                "generation_lengths": torch.tensor(lengths),
                "unpadded_sequence_lengths": torch.tensor(totals),
                "logprobs": logprobs,
                "truncated": torch.tensor([each.truncated for each in completions]),
            }
        )


def _sampling_params(generation: Mapping[str, Any]) -> SamplingParams:
    """NeMo-RL's `policy.generation` section as the sampler's parameters."""
    return SamplingParams(
        max_new_tokens=generation["max_new_tokens"],
        temperature=generation["temperature"],
        top_p=generation["top_p"],
        top_k=generation["top_k"],
        stop_strings=tuple(generation["stop_strings"] or ()),
        stop_token_ids=tuple(generation["stop_token_ids"] or ()),
    )


def policy_of(config: Mapping[str, Any]) -> LoadedPolicy:
    """The model of NeMo-RL's `policy` section."""
    template = config["tokenizer"].get("chat_template")
    return open_policy(config["model_name"], precision=config["precision"], chat_template=template)


class LocalGenerationWorker:
    """The model that samples. It answers nothing before it has got weights: what the folder holds
    is not what a resumed run continues with."""

    def __init__(self, config: Mapping[str, Any], seed: int) -> None:
        torch.set_num_threads(1)
        policy = policy_of(config)
        self._model = policy.model
        self._generation = LocalGeneration(policy, config, seed)
        self._ready = asyncio.Event()

    async def load(self, weights: Mapping[str, torch.Tensor], version: int) -> bool:
        """Takes over the weights after `version` updates, between two calls of the sampler."""
        await asyncio.to_thread(self._load, weights, version)
        self._ready.set()
        return True

    def _load(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        with self._generation.weights:
            self._model.load_state_dict(weights)
            self._generation.change_version(version)

    async def generate(self, data: Any, greedy: bool) -> BatchedDataDict:
        """NeMo-RL's `generate`."""
        await self._ready.wait()
        return await asyncio.to_thread(self._generation.generate, data, greedy)

    async def generate_one(self, data: Any, greedy: bool) -> BatchedDataDict:
        """The one result of NeMo-RL's `generate_async`."""
        await self._ready.wait()
        [(_, result)] = [each async for each in self._generation.generate_async(data, greedy)]
        return result


_ACTOR_OPTIONS: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 4_096}

LocalGenerationActor = ray.remote(**_ACTOR_OPTIONS)(LocalGenerationWorker)


class RemoteGeneration(OneMachine, GenerationInterface):
    """NeMo-RL's generation interface in front of the actor; travels to other processes.

    A refit is the policy's doing: it calls `receive`, and NeMo-RL's own two halves of it have
    nothing left to do.
    """

    def __init__(self, config: Mapping[str, Any], seed: int) -> None:
        self.cfg = config["generation"]
        self.version = 0
        self._actor: Any = LocalGenerationActor.remote(dict(config), seed)

    def change_version(self, version: int) -> None:
        """To be called after a policy update; the actor learns of it with the weights."""
        self.version = version

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

    def shutdown(self) -> bool:
        ray.kill(self._actor)
        return True

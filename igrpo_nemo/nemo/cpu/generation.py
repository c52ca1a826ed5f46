"""The embedded engine's sampler behind NeMo-RL's generation interface, both kinds of it.

    generate(batch) ──────────> one call of the sampler for all rows
    generate_async(one row) ──> collected with the others that wait, then one call for all of them

A draw is named by (seed, policy version, prompt, how often that prompt was drawn under it), so it
does not depend on what else is in a batch, and a resumed run repeats it.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from nemo_rl.distributed.batched_data_dict import BatchedDataDict

from igrpo_nemo.local.sampler import Sampler, SampleRequest, SamplingParams
from igrpo_nemo.types import Completion


@dataclass(slots=True)
class _Waiting:
    prompt_ids: tuple[int, ...]
    greedy: bool
    answer: asyncio.Future[Completion]


class LocalGeneration:
    """Samples with the policy's current weights. `version` counts its updates."""

    stops_when_cancelled = True
    """Nothing outlives its caller that a change of weights would have to wait for."""

    def __init__(
        self, sampler: Sampler, params: SamplingParams, *, seed: int, pad_token_id: int
    ) -> None:
        self._sampler = sampler
        self._params = params
        self._seed = seed
        self._pad_token_id = pad_token_id
        self._drawn: Counter[str] = Counter()
        self._waiting: list[_Waiting] = []
        self._pump: asyncio.Task[None] | None = None
        # Sampling and a change of weights exclude each other where they come from two threads.
        self._weights = threading.Lock()
        self.version = 0

    def advance(self) -> None:
        """To be called after a policy update."""
        self.version += 1
        self._drawn.clear()

    def change_weights(self, load: Callable[[], None], version: int) -> None:
        """Calls `load` while nothing is sampled; what follows is drawn under `version`."""
        with self._weights:
            load()
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
        self._waiting.append(_Waiting(prompt_ids, greedy, answer))
        if self._pump is None or self._pump.done():
            self._pump = asyncio.ensure_future(self._serve())
        yield 0, self._output([prompt_ids], [await answer])

    async def _serve(self) -> None:
        """Answers what waits, in batches, until nothing does."""
        while True:
            # Lets every coroutine that is about to ask do so first.
            await asyncio.sleep(0.001)
            batch, self._waiting = self._waiting, []
            batch = [each for each in batch if not each.answer.done()]
            if not batch:
                return
            for greedy in {each.greedy for each in batch}:
                await self._answer([each for each in batch if each.greedy is greedy], greedy)

    async def _answer(self, batch: Sequence[_Waiting], greedy: bool) -> None:
        prompts = [each.prompt_ids for each in batch]
        try:
            completions = await asyncio.to_thread(self._sample, prompts, greedy)
        except Exception as error:  # every waiting caller must learn of it
            for each in batch:
                if not each.answer.done():
                    each.answer.set_exception(error)
            return
        for each, completion in zip(batch, completions, strict=True):
            if not each.answer.done():
                each.answer.set_result(completion)

    def _sample(
        self, prompts: Sequence[tuple[int, ...]], greedy: bool, *, together: bool = False
    ) -> list[Completion]:
        """A completion per prompt. `together`: equal prompts share one prefill, and a name."""
        with self._weights:
            return self._sample_now(prompts, greedy, together)

    def _sample_now(
        self, prompts: Sequence[tuple[int, ...]], greedy: bool, together: bool
    ) -> list[Completion]:
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows_of.setdefault(prompt, []).append(row)
        requests, owners = [], []
        for prompt, rows in rows_of.items():
            digest = hashlib.sha256(repr(prompt).encode()).hexdigest()[:16]
            for share in [rows] if together else [[row] for row in rows]:
                number, self._drawn[digest] = self._drawn[digest], self._drawn[digest] + len(share)
                key = f"{self._seed}/{self.version}/{digest}/{number}"
                requests.append(SampleRequest(prompt, len(share), key))
                owners += share
        params = replace(self._params, temperature=0.0) if greedy else self._params
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


def sampling_params(generation: Mapping[str, Any]) -> SamplingParams:
    """NeMo-RL's `policy.generation` section as the sampler's parameters."""
    return SamplingParams(
        max_new_tokens=generation["max_new_tokens"],
        temperature=generation["temperature"],
        top_p=generation["top_p"],
        top_k=generation["top_k"],
        stop_strings=tuple(generation["stop_strings"] or ()),
        stop_token_ids=tuple(generation["stop_token_ids"] or ()),
    )

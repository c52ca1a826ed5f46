"""NeMo-RL's generation as an engine: one call for a batch, or a call per completion.

BatchEngine.sample_all(prompts) ─ generate_responses ──────> policy_generation.generate
AsyncEngine.sample(prompt)      ─ generate_responses_async ─> policy_generation.generate_async
                                  routed: requests of a group go to one shard
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.experience import rollouts as nemo_rollouts

from igrpo_nemo.nemo.batches import completion_of, user_message
from igrpo_nemo.nemo.errors import RowError
from igrpo_nemo.nemo.routing import ShardView, router_of
from igrpo_nemo.types import Completion, Prompt


class _NemoEngine:
    """NeMo-RL's generation interface, and how it is asked."""

    def __init__(
        self, generation: Any, tokenizer: Any, *, stop_strings: list[str] | None, greedy: bool
    ) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self._stop_strings = stop_strings
        self._greedy = greedy

    def _batch(
        self, prompts: Sequence[Prompt]
    ) -> tuple[BatchedDataDict, BatchedDataDict, torch.Tensor]:
        """The rows to answer, the engine's right-padded input, and the prompts' lengths."""
        messages = [user_message(prompt) for prompt in prompts]
        lengths = torch.tensor([len(prompt.token_ids) for prompt in prompts])
        padded = torch.nn.utils.rnn.pad_sequence(
            [message["token_ids"] for message in messages],
            batch_first=True,
            padding_value=self._tokenizer.pad_token_id,
        )
        stops = [self._stop_strings] * len(prompts)
        rows: BatchedDataDict = BatchedDataDict(
            {"message_log": [[message] for message in messages], "stop_strings": stops}
        )
        inputs: BatchedDataDict = BatchedDataDict({"input_ids": padded, "input_lengths": lengths})
        return rows, inputs, lengths


class BatchEngine(_NemoEngine):
    """Samples many prompts in one call of the synchronous engine, which shards contiguous rows."""

    def sample_all(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """One completion per prompt, in order."""
        rows, inputs, lengths = self._batch(prompts)
        rows, _, metrics = nemo_rollouts.generate_responses(
            self._generation, inputs, rows, self._tokenizer, lengths, greedy=self._greedy
        )
        return _completions(rows, metrics, prompts)


class AsyncEngine(_NemoEngine):
    """Samples one prompt at a time from the asynchronous engine; all requests run concurrently.

    A cancelled request leaves a generation that `stops_when_cancelled`. vLLM behind NeMo-RL decodes
    it to its end: `drain` waits for that.
    """

    def __init__(self, generation: Any, tokenizer: Any, **options: Any) -> None:
        super().__init__(generation, tokenizer, **options)
        self._router = router_of(generation)
        self._call = object()
        self._stops = getattr(generation, "stops_when_cancelled", False)
        self._running: set[asyncio.Task[Any]] = set()
        self.worker_tokens: dict[int, int] = {}

    def load(self) -> int:
        return self._router.least_load()

    async def sample(self, prompt: Prompt, route: str) -> Completion:
        group = (self._call, route)
        shard = self._router.enter(group)
        request = asyncio.ensure_future(self._generate(prompt, shard))
        self._running.add(request)
        request.add_done_callback(self._running.discard)
        request.add_done_callback(lambda _: self._router.leave(group))
        rows, metrics = await (request if self._stops else asyncio.shield(request))
        [completion] = _completions(rows, metrics, [prompt])
        worker = metrics.get("gen_leader_worker_idx")
        if worker is not None:
            tokens = self.worker_tokens.get(int(worker), 0) + len(completion.token_ids)
            self.worker_tokens[int(worker)] = tokens
        return completion

    async def drain(self) -> None:
        """Returns when nothing runs any more. To be awaited before the weights change: vLLM drops
        its prefix cache only when it is idle, and would go on with the old policy's keys."""
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _generate(self, prompt: Prompt, shard: int) -> tuple[Any, Any]:
        rows, inputs, lengths = self._batch([prompt])
        rows, _, metrics = await nemo_rollouts.generate_responses_async(
            ShardView(self._generation, shard),  # type: ignore[arg-type]
            inputs,
            rows,
            self._tokenizer,
            lengths,
            greedy=self._greedy,
        )
        return rows, metrics


def _completions(rows: Any, metrics: Any, prompts: Sequence[Prompt]) -> list[Completion]:
    """The assistant message of every row. Raises `RowError` where one is missing or empty."""
    truncated = metrics.get("_response_truncated")
    completions = []
    for row, (log, prompt) in enumerate(zip(rows["message_log"], prompts, strict=True)):
        if len(log) != 2 or log[1]["role"] != "assistant":
            raise RowError(row, "the engine returned no answer")
        if len(log[1]["token_ids"]) == 0:
            raise RowError(
                row,
                f"the engine returned no token for a prompt of {len(prompt.token_ids)} tokens: is "
                "its context (policy.generation.vllm_cfg.max_model_len) shorter than "
                "policy.max_total_sequence_length?",
            )
        ended = truncated is not None and bool(truncated[row])
        completions.append(completion_of(log[1], truncated=ended))
    return completions

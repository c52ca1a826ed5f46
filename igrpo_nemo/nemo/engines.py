"""NeMo-RL's generation as an engine: one call for a batch, or a call per completion.

BatchEngine.sample_all(prompts) ─ generate_responses ──────> policy_generation.generate
AsyncEngine.sample(prompt)      ─ generate_responses_async ─> policy_generation.generate_async
Router.enter(group) ─> a data-parallel shard ─> ShardView: requests of a group go to one shard
"""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Hashable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.experience import rollouts as nemo_rollouts

from igrpo_nemo.nemo.batches import completion_of, user_message
from igrpo_nemo.types import Completion, Prompt


class RowError(RuntimeError):
    """A row of an engine's answer is unusable; `row` counts from 0."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(reason)
        self.row = row


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

    `worker_tokens`: tokens by the worker that generated them, where the backend tells.
    """

    def __init__(self, generation: Any, tokenizer: Any, **options: Any) -> None:
        super().__init__(generation, tokenizer, **options)
        self._router = router_of(generation)
        self._call = object()
        self.worker_tokens: dict[int, int] = {}

    async def sample(self, prompt: Prompt, route: str) -> Completion:
        """Raises `RowError` where the engine gives no answer."""
        rows, inputs, lengths = self._batch([prompt])
        group = (self._call, route)
        view: Any = ShardView(self._generation, self._router.enter(group))
        try:
            rows, _, metrics = await nemo_rollouts.generate_responses_async(
                view, inputs, rows, self._tokenizer, lengths, greedy=self._greedy
            )
        finally:
            self._router.leave(group)
        [completion] = _completions(rows, metrics, [prompt])
        worker = metrics.get("gen_leader_worker_idx")
        if worker is not None:
            tokens = self.worker_tokens.get(int(worker), 0) + len(completion.token_ids)
            self.worker_tokens[int(worker)] = tokens
        return completion


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


class Router:
    """Sends a group to one shard, the one with the fewest requests when the group begins.

    The refinements of one q' then prefill it once: the engine's own round robin would spread them
    over shards that do not share a prefix cache. Rollouts in several threads share a router.
    """

    def __init__(self, shards: int) -> None:
        self._lock = threading.Lock()
        self._running = [0] * max(shards, 1)
        self._groups: dict[Hashable, _Group] = {}

    def enter(self, group: Hashable) -> int:
        """The shard for one more request of a group."""
        with self._lock:
            known = self._groups.get(group)
            if known is None:
                shard = min(range(len(self._running)), key=self._running.__getitem__)
                known = self._groups[group] = _Group(shard)
            known.requests += 1
            self._running[known.shard] += 1
            return known.shard

    def leave(self, group: Hashable) -> None:
        """One request of a group is over; a group without any is forgotten."""
        with self._lock:
            known = self._groups[group]
            known.requests -= 1
            self._running[known.shard] -= 1
            if not known.requests:
                del self._groups[group]


@dataclass(slots=True)
class _Group:
    shard: int
    requests: int = 0


_ROUTERS: WeakKeyDictionary[Any, Router] = WeakKeyDictionary()
_ROUTERS_LOCK = threading.Lock()


def router_of(generation: Any) -> Router:
    """The router of an engine, the same for every rollout of this process: the asynchronous trainer
    rolls out each problem in a call of its own."""
    with _ROUTERS_LOCK:
        return _ROUTERS.setdefault(generation, Router(shard_count(generation)))


class ShardView:
    """A generation interface whose requests go to one shard; a reference, never a copy.

    vLLM's interface chooses the shard before its first await, so setting it right before the call
    is enough and no other coroutine comes between.
    """

    def __init__(self, generation: Any, shard: int) -> None:
        self._generation = generation
        self._shard = shard

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generation, name)

    async def generate_async(self, data: Any, greedy: bool = False) -> AsyncGenerator[Any, None]:
        if hasattr(self._generation, "current_generate_dp_shard_idx"):
            self._generation.current_generate_dp_shard_idx = self._shard
        async for result in self._generation.generate_async(data, greedy=greedy):
            yield result


def shard_count(generation: Any) -> int:
    """Data-parallel shards of an engine; 1 where it has none to choose from."""
    return int(getattr(getattr(generation, "worker_group", None), "dp_size", 1) or 1)

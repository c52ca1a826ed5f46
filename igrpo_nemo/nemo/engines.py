"""NeMo-RL's generation as an engine: one call for all groups, or a call per completion.

BatchEngine ─ generate_responses ──────> policy_generation.generate
AsyncEngine ─ generate_responses_async ─> policy_generation.generate_async
Router.enter(group) ─> a data-parallel shard ─> ShardView: requests of a group go to one shard
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.experience import rollouts as nemo_rollouts

from igrpo_nemo.environment import StepReturn
from igrpo_nemo.nemo.batches import completion_of, user_message
from igrpo_nemo.nemo.failure import RolloutError
from igrpo_nemo.nemo.stages import Then, Wanted, one_by_one, together
from igrpo_nemo.types import Completion, Prompt, Stage


class _NemoEngine:
    """NeMo-RL's generation interface, and how it is asked.

    `seconds` by stage: how long calls of the synchronous engine took. `worker_tokens`: tokens by
    the worker of the asynchronous one that generated them, where the backend tells.
    """

    def __init__(
        self, generation: Any, tokenizer: Any, *, stop_strings: list[str] | None, greedy: bool
    ) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self._stop_strings = stop_strings
        self._greedy = greedy
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.worker_tokens: Counter[int] = Counter()

    def _request(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """The arguments of NeMo-RL's functions: the rows to answer, and the engine's right-padded
        input with the prompts' lengths."""
        messages = [user_message(prompt) for prompt in prompts]
        lengths = torch.tensor([len(prompt.token_ids) for prompt in prompts])
        padded = torch.nn.utils.rnn.pad_sequence(
            [message["token_ids"] for message in messages],
            batch_first=True,
            padding_value=self._tokenizer.pad_token_id,
        )
        inputs = BatchedDataDict({"input_ids": padded, "input_lengths": lengths})
        rows = {
            "message_log": [[message] for message in messages],
            "stop_strings": [self._stop_strings] * len(prompts),
        }
        return {
            "generation_input_data": inputs,
            "batch": BatchedDataDict(rows),
            "tokenizer": self._tokenizer,
            "input_lengths": lengths,
            "greedy": self._greedy,
        }


class BatchEngine(_NemoEngine):
    """One call of the synchronous engine, which shards contiguous rows, for all groups."""

    async def sample(self, wanted: Sequence[Wanted], then: Then) -> list[StepReturn]:
        """All groups are complete before the first is scored."""
        if not wanted:
            return []
        start = time.perf_counter()
        asked = [each for each in wanted for _ in range(each.next.num_samples)]
        problem, stage = wanted[0].item.problem, wanted[0].stage
        with RolloutError.at(problem, f"{stage}, {len(asked)} rows in one call"):
            rows, _, metrics = nemo_rollouts.generate_responses(
                self._generation, **self._request([each.next.prompt for each in asked])
            )
        completions = []
        for row, each in enumerate(asked):
            with RolloutError.at(each.item.problem, each.stage):
                log = rows["message_log"][row]
                completions.append(_answer(log, metrics, row, each.next.prompt))
        stage = Stage.DRAFT if stage == Stage.DRAFT else Stage.REFINE
        self.seconds[stage] += time.perf_counter() - start
        rest = iter(completions)
        groups = [[next(rest) for _ in range(each.next.num_samples)] for each in wanted]
        return await together([then(*each) for each in zip(wanted, groups, strict=True)])


class AsyncEngine(_NemoEngine):
    """One request of the asynchronous engine per completion; all run concurrently."""

    async def sample(self, wanted: Sequence[Wanted], then: Then) -> list[StepReturn]:
        """A group is scored as soon as it is complete."""
        router = router_of(self._generation)

        async def group(each: Wanted) -> list[Completion]:
            prompt, count = each.next.prompt, each.next.num_samples
            shard = router.enter(count)
            return await together([self._one(prompt, router, shard) for _ in range(count)])

        return await one_by_one(wanted, then, group)

    async def _one(self, prompt: Prompt, router: Router, shard: int) -> Completion:
        view: Any = ShardView(self._generation, shard)
        try:
            rows, _, metrics = await nemo_rollouts.generate_responses_async(
                view, **self._request([prompt])
            )
        finally:
            router.leave(shard)
        completion = _answer(rows["message_log"][0], metrics, 0, prompt)
        worker = metrics.get("gen_leader_worker_idx")
        if worker is not None:
            self.worker_tokens[int(worker)] += len(completion.token_ids)
        return completion


def _answer(
    log: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], row: int, prompt: Prompt
) -> Completion:
    """The completion that the engine wrote behind a prompt. Raises `RuntimeError` without one."""
    truncated = metrics.get("_response_truncated")
    completion = completion_of(log, truncated=truncated is not None and bool(truncated[row]))
    if not completion.token_ids:
        raise RuntimeError(
            f"the engine returned no token for a prompt of {len(prompt.token_ids)} tokens: is its "
            "context (policy.generation.vllm_cfg.max_model_len) shorter than "
            "policy.max_total_sequence_length?"
        )
    return completion


class Router:
    """Sends a group to one shard, the one with the fewest requests when the group begins.

    The refinements of one q' then prefill it once: the engine's own round robin would spread them
    over shards that do not share a prefix cache. Rollouts in several threads share a router.
    """

    def __init__(self, shards: int) -> None:
        self._lock = threading.Lock()
        self._running = [0] * max(shards, 1)

    def enter(self, requests: int) -> int:
        """The shard for a group of that many requests."""
        with self._lock:
            shard = min(range(len(self._running)), key=self._running.__getitem__)
            self._running[shard] += requests
            return shard

    def leave(self, shard: int) -> None:
        """One request is over."""
        with self._lock:
            self._running[shard] -= 1


_ROUTERS: WeakKeyDictionary[Any, Router] = WeakKeyDictionary()
_ROUTERS_LOCK = threading.Lock()


def router_of(generation: Any) -> Router:
    """The router of an engine, the same for every rollout of this process: the asynchronous trainer
    rolls out each problem in a call of its own."""
    shards = getattr(getattr(generation, "worker_group", None), "dp_size", 1)
    with _ROUTERS_LOCK:
        return _ROUTERS.setdefault(generation, Router(int(shards or 1)))


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

"""Which data-parallel shard of an asynchronous engine answers a request.

Router.enter(group) ─> a shard ─> ShardView: a generation interface whose requests go there
"""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Hashable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary


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

    def least_load(self) -> int:
        """Requests on the shard where a new group would go."""
        with self._lock:
            return min(self._running)


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

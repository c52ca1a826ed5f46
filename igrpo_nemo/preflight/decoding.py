"""How long an inference engine takes for a rollout: a roofline, and a queue.

A decoding step reads the weights and the caches of every running sequence once; it takes as long
as that or as its arithmetic, whichever is longer. Sequences leave when they end; a refinement
waits until its problem's drafts have ended, and everything waits for a free place.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Speed:
    """One engine of `tensor` GPUs, in seconds and bytes of one of them.

    `weights` bytes are read in every step, `per_token` for each cached token of a running
    sequence, `per_sequence` for each running sequence; `flops` are those of a new token.
    """

    weights: float
    per_token: float
    per_sequence: float
    bandwidth: float
    flops: float
    flops_per_s: float
    overhead: float
    places: int

    def step(self, running: float, cached: float) -> float:
        """Seconds of a decoding step of `running` sequences with `cached` tokens in all."""
        moved = self.weights + self.per_token * cached + self.per_sequence * running
        return self.overhead + max(moved / self.bandwidth, self.flops * running / self.flops_per_s)


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """Completions of one prompt: its tokens, theirs, and the seconds of its prefill.

    `after` are the completions of another prompt that must have ended: the drafts of a q'.
    """

    prompt: int
    lengths: tuple[int, ...]
    prefill: float
    then: PromptGroup | None = None


@dataclass(slots=True)
class _Running:
    """The engine's state between two events; time in decoding steps and in seconds."""

    now: int = 0
    seconds: float = 0.0
    cached: float = 0.0
    ends: list[tuple[int, int, int]] = field(default_factory=list)


def decode_seconds(groups: Sequence[PromptGroup], speed: Speed) -> float:
    """Seconds until every completion of every group, and of what follows it, has ended."""
    waiting: deque[tuple[int, int]] = deque()
    prompts: list[PromptGroup] = []
    left: list[int] = []
    state = _Running()

    def arrive(group: PromptGroup) -> None:
        number = len(prompts)
        prompts.append(group)
        left.append(len(group.lengths))
        state.seconds += group.prefill
        waiting.extend((number, length) for length in group.lengths)

    for group in groups:
        arrive(group)
    while waiting or state.ends:
        while waiting and len(state.ends) < speed.places:
            number, length = waiting.popleft()
            heapq.heappush(state.ends, (state.now + length, number, length))
            state.cached += prompts[number].prompt
        _advance(state, speed)
        for number in _ended(state, prompts):
            left[number] -= 1
            following = prompts[number].then
            if left[number] == 0 and following is not None:
                arrive(following)
    return state.seconds


def _advance(state: _Running, speed: Speed) -> None:
    """To the next end: every running sequence grows by a token a step."""
    steps, running = state.ends[0][0] - state.now, len(state.ends)
    state.seconds += steps * speed.step(running, state.cached + running * steps / 2)
    state.cached += running * steps
    state.now += steps


def _ended(state: _Running, prompts: Sequence[PromptGroup]) -> Iterator[int]:
    """Takes the sequences that end now out of the batch; yields their groups."""
    while state.ends and state.ends[0][0] == state.now:
        _, number, length = heapq.heappop(state.ends)
        state.cached -= prompts[number].prompt + length
        yield number

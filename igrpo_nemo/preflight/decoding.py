"""How long an inference engine takes for a rollout: a roofline, and a queue.

A decoding step reads the weights and the caches of every running sequence once; it takes as long
as that or as its arithmetic, whichever is longer. Sequences leave when they end; a refinement
waits until its problem's drafts have ended, and everything waits for a free place.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


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

    `then` are the completions of another prompt that follow when these have ended: a q' and its
    drafts.
    """

    prompt: int
    lengths: tuple[int, ...]
    prefill: float
    then: PromptGroup | None = None


def decode_seconds(groups: Sequence[PromptGroup], speed: Speed) -> float:
    """Seconds until every completion of every group, and of what follows it, has ended."""
    waiting: deque[tuple[int, int]] = deque()
    prompts: list[PromptGroup] = []
    left: list[int] = []  # completions of each group that have not ended
    ends: list[tuple[int, int, int]] = []  # of what runs: the decoding step, group, length
    now, seconds, cached = 0, 0.0, 0.0

    def arrive(group: PromptGroup) -> float:
        waiting.extend((len(prompts), length) for length in group.lengths)
        prompts.append(group)
        left.append(len(group.lengths))
        return group.prefill

    for group in groups:
        seconds += arrive(group)
    while waiting or ends:
        while waiting and len(ends) < speed.places:
            number, length = waiting.popleft()
            heapq.heappush(ends, (now + length, number, length))
            cached += prompts[number].prompt
        # To the next end: every running sequence grows by a token a step.
        steps, running = ends[0][0] - now, len(ends)
        seconds += steps * speed.step(running, cached + running * steps / 2)
        cached += running * steps
        now += steps
        while ends and ends[0][0] == now:
            _, number, length = heapq.heappop(ends)
            cached -= prompts[number].prompt + length
            left[number] -= 1
            following = prompts[number].then
            if left[number] == 0 and following is not None:
                seconds += arrive(following)
    return seconds

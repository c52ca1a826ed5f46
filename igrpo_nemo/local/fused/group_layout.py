"""Which token of a flat stream attends to which: trunks, and the branches that share them.

    flat tokens   [trunk 1 | trunk 2 | ... || branches of 1 | branches of 2 | ...]

`buckets` and `branchings` are the layout for kernels that take padded segments, `own` and `shared`
for those that take sequences of a stream.

Shape legend: S segments of a bucket, T tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

# Segments whose lengths differ by less share one padded call.
_BUCKET_FILL = 0.75


@dataclass(frozen=True, slots=True)
class Bucket:
    """Segments of similar length, padded for one call: flat positions, behind a segment's end its
    last one again, so that padding is a valid query; `inside_ST` says which are real."""

    padded_ST: Tensor
    inside_ST: Tensor
    positions: Tensor
    """padded_ST[inside_ST]: the flat positions that the bucket covers."""
    full: bool
    """Whether there is no padding."""


Segment = tuple[int, int]
"""[start, end) of the flat tokens."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """Where the query and key sequences of one call end in their streams, int32 on the device."""

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int

    @classmethod
    def of(cls, queries: list[int], keys: list[int], device: torch.device) -> Sequences:
        of_queries, of_keys = (
            torch.tensor(ends, dtype=torch.int32, device=device) for ends in (queries, keys)
        )
        longest, longest_key = (max(b - a for a, b in pairwise(x)) for x in (queries, keys))
        return cls(of_queries, of_keys, longest, longest_key)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, int, int]:
        """In the order of PyTorch's kernels."""
        return self.queries, self.keys, self.longest_query, self.longest_key


@dataclass(frozen=True, slots=True)
class Branching:
    """One trunk, [start, end) of the flat tokens, and the contiguous tokens of its branches."""

    trunk: Segment
    branches: Segment
    branch_lengths: tuple[int, ...]


@dataclass(frozen=True)
class GroupLayout:
    """Which flat token attends to which: causal segments, [start, end) each, and branchings.

    `branched` are the trunks that have branches, `alone` those that have none, `tail` where the
    latter begin. A last layer needs queries from there on only; `tail_layout()` leaves the others
    out.
    """

    branched: tuple[Segment, ...]
    alone: tuple[Segment, ...]
    branches: tuple[Segment, ...]
    branchings: tuple[Branching, ...]
    tail: int
    device: torch.device

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        tail = _buckets(self.alone + self.branches, self.device)
        return _buckets(self.branched, self.device) + tail

    def tail_layout(self) -> GroupLayout:
        return replace(self, branched=())

    @cached_property
    def own(self) -> Sequences:
        """Every segment of the stream, by itself."""
        ends = [end for _, end in self.branched + self.alone + self.branches]
        return Sequences.of([0, *ends], [0, *ends], self.device)

    @cached_property
    def shared(self) -> Sequences:
        """The branches of each trunk together, before the tokens of the trunk."""
        first = self.branches[0][0]
        ends = [each.branches[1] - first for each in self.branchings]
        trunks = [each.trunk[1] for each in self.branchings]
        return Sequences.of([0, *ends], [0, *trunks], self.device)


def group_layout(
    trunk_lengths: Sequence[int], branch_lengths: Sequence[Sequence[int]], device: torch.device
) -> GroupLayout:
    """The layout of all trunks, followed by the branches of each trunk in turn.

    `branch_lengths[i]` are those of trunk i; trunks without branches come last.
    """
    ends = [0, *accumulate(trunk_lengths)]
    trunks, start = list(pairwise(ends)), ends[-1]
    num_branched = sum(1 for lengths in branch_lengths if lengths)
    if any(branch_lengths[num_branched:]):
        raise ValueError("trunks without branches must come last")
    branched, alone = trunks[:num_branched], trunks[num_branched:]
    tail = branched[-1][1] if branched else 0
    branches, branchings = [], []
    for trunk, lengths in zip(branched, branch_lengths, strict=False):
        ends = list(accumulate(lengths, initial=start))
        branches += pairwise(ends)
        if trunk[1] > trunk[0]:
            branchings.append(Branching(trunk, (start, ends[-1]), tuple(lengths)))
        start = ends[-1]
    return GroupLayout(
        tuple(branched), tuple(alone), tuple(branches), tuple(branchings), tail, device
    )


def _buckets(segments: Sequence[Segment], device: torch.device) -> tuple[Bucket, ...]:
    remaining = sorted((s for s in segments if s[1] > s[0]), key=lambda s: (s[0] - s[1], s[0]))
    buckets = []
    while remaining:
        longest = remaining[0][1] - remaining[0][0]
        count = sum(end - start >= _BUCKET_FILL * longest for start, end in remaining)
        starts_S = torch.tensor([start for start, _ in remaining[:count]])
        lengths_S = torch.tensor([end - start for start, end in remaining[:count]])
        steps_T = torch.arange(longest)
        inside_ST = steps_T < lengths_S[:, None]
        padded_ST = starts_S[:, None] + torch.minimum(steps_T, lengths_S[:, None] - 1)
        buckets.append(
            Bucket(
                padded_ST.to(device),
                inside_ST.to(device),
                padded_ST[inside_ST].to(device),
                bool(inside_ST.all()),
            )
        )
        remaining = remaining[count:]
    return tuple(buckets)

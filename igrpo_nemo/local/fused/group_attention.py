"""Attention over sequences that share a context, which is computed once.

    flat tokens   [trunk 1 | trunk 2 | ... || branches of 1 | branches of 2 | ...]
    every token   attends causally to its own segment (a trunk or one branch)
    branch tokens attend to all of their trunk as well; the two partial softmaxes are merged by
                  their log-sum-exps (as ring attention does, arXiv:2310.01889)

The stream has no padding and there is no token-by-token mask, so that memory and work grow
linearly with the number of branches. On a CPU the kernels take padded buckets of segments, on a
GPU in half precision the stream as it is; elsewhere PyTorch's own attention does the same.

Shape legend: L flat tokens, S segments of a bucket, T tokens of a segment, H query heads, K
key-value heads, g = H / K, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Segments whose lengths differ by less share one padded call.
_BUCKET_FILL = 0.75


@dataclass(frozen=True, slots=True)
class Bucket:
    """Segments of similar length, padded for one call.

    `padded_ST` holds flat positions; behind a segment's end its last position is repeated, so
    that padding is a valid query. `inside_ST` says which slots are real.
    """

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
        return cls(
            torch.tensor(queries, dtype=torch.int32, device=device),
            torch.tensor(keys, dtype=torch.int32, device=device),
            max(b - a for a, b in pairwise(queries)),
            max(b - a for a, b in pairwise(keys)),
        )


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
    trunks, start = [], 0
    for length in trunk_lengths:
        trunks.append((start, start + length))
        start += length
    num_branched = sum(1 for lengths in branch_lengths if lengths)
    if any(branch_lengths[num_branched:]):
        raise ValueError("trunks without branches must come last")
    branched, alone = trunks[:num_branched], trunks[num_branched:]
    tail = branched[-1][1] if branched else 0
    branches, branchings = [], []
    for trunk, lengths in zip(branched, branch_lengths, strict=False):
        first = start
        for length in lengths:
            branches.append((start, start + length))
            start += length
        if trunk[1] > trunk[0]:
            branchings.append(Branching(trunk, (first, start), tuple(lengths)))
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


def group_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    group_layout: GroupLayout,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that a Hugging Face model calls (`AttentionInterface`).

    query [1, H, L, D], key and value [1, K, L, D] -> [1, L, H, D].
    """
    if dropout:
        raise ValueError("group attention has no dropout")
    q_LHD, k_LKD, v_LKD = (x[0].transpose(0, 1) for x in (query, key, value))
    return group_attention(q_LHD, k_LKD, v_LKD, group_layout, scaling).unsqueeze(0), None


def group_attention(
    q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, layout: GroupLayout, scale: float
) -> Tensor:
    """softmax(scale * q k^T) v over the pairs of the layout: [L, H, D], differentiable once."""
    if q_LHD.device.type == "cpu":
        k_LKD, v_LKD = k_LKD.to(q_LHD.dtype), v_LKD.to(q_LHD.dtype)
        out_LHD = _RingAttention.apply(q_LHD, k_LKD, v_LKD, layout, scale)
        assert isinstance(out_LHD, Tensor)
        return out_LHD
    if torch.is_autocast_enabled(q_LHD.device.type):
        dtype = torch.get_autocast_dtype(q_LHD.device.type)
        q_LHD, k_LKD, v_LKD = q_LHD.to(dtype), k_LKD.to(dtype), v_LKD.to(dtype)
    if q_LHD.dtype in (torch.bfloat16, torch.float16) and takes_stream(q_LHD, layout):
        out_LHD = _StreamAttention.apply(q_LHD, k_LKD, v_LKD, layout, scale)
        assert isinstance(out_LHD, Tensor)
        return out_LHD
    return expanded_attention(q_LHD, k_LKD, v_LKD, layout, scale)


def expanded_attention(
    q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, layout: GroupLayout, scale: float
) -> Tensor:
    """The same with PyTorch's own kernels and autograd, on any device.

    A trunk's keys and values are repeated for each branch, one trunk at a time: still linear in
    the number of branches.
    """
    out_LHD = torch.zeros_like(q_LHD)
    for bucket in layout.buckets:
        q, k, v = (_segments(x, bucket) for x in (q_LHD, k_LKD, v_LKD))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=True
        ).transpose(1, 2)
        out_LHD = out_LHD.index_copy(0, bucket.positions, out[bucket.inside_ST].to(out_LHD.dtype))
    for branching in layout.branchings:
        (a, b), (c, d) = branching.trunk, branching.branches
        q, k, v = (
            nn.utils.rnn.pad_sequence(list(x[c:d].split(branching.branch_lengths)), True)
            for x in (q_LHD, k_LKD, v_LKD)
        )
        S, T = q.shape[:2]
        k, v = (
            torch.cat([x[a:b].expand(S, -1, -1, -1), own], dim=1)
            for x, own in ((k_LKD, k), (v_LKD, v))
        )
        visible = torch.ones(T, b - a + T, dtype=torch.bool, device=q.device).tril(b - a)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            visible,
            scale=scale,
            enable_gqa=True,
        ).transpose(1, 2)
        flat = torch.cat([out[i, :length] for i, length in enumerate(branching.branch_lengths)])
        out_LHD = torch.cat([out_LHD[:c], flat.to(out_LHD.dtype), out_LHD[d:]])
    return out_LHD


def _segments(x_LHD: Tensor, bucket: Bucket) -> Tensor:
    """[L, H, D] -> [S, H, T, D]."""
    return x_LHD[bucket.padded_ST].transpose(1, 2)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, layout: GroupLayout, scale: float
    ) -> Tensor:
        out_LHD, lse_LH = ring_forward(q_LHD, k_LKD, v_LKD, layout, scale)
        ctx.save_for_backward(q_LHD, k_LKD, v_LKD, out_LHD, lse_LH)
        ctx.layout, ctx.scale = layout, scale
        return out_LHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_LHD: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_LHD, k_LKD, v_LKD, out_LHD, lse_LH = ctx.saved_tensors
        grads = tuple(x.new_zeros(x.shape) for x in (q_LHD, k_LKD, v_LKD))
        ring_backward(
            grad_LHD, q_LHD, k_LKD, v_LKD, out_LHD, lse_LH, ctx.layout, ctx.scale, into=grads
        )
        return *grads, None, None


def ring_forward(
    q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, layout: GroupLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Both partial attentions with the CPU flash kernels, merged: out [L, H, D], lse [L, H].

    Tokens that the layout does not cover as queries get 0.
    """
    L, H, _ = q_LHD.shape
    g = H // k_LKD.shape[1]
    out_LHD = q_LHD.new_zeros(q_LHD.shape)
    # The kernels keep log-sum-exps in float32 when they are given less.
    lse_LH = q_LHD.new_zeros(L, H, dtype=torch.promote_types(q_LHD.dtype, torch.float32))
    for bucket in layout.buckets:
        q = _segments(q_LHD, bucket)
        k, v = (_repeat(_segments(x, bucket), g) for x in (k_LKD, v_LKD))
        out, lse = _flash(q, k, v, 0.0, True, scale=scale)
        out_LHD[bucket.positions] = out.transpose(1, 2)[bucket.inside_ST]
        lse_LH[bucket.positions] = lse.transpose(1, 2)[bucket.inside_ST]
    for branching in layout.branchings:
        (a, b), (c, d) = branching.trunk, branching.branches
        q, (k, v) = _heads(q_LHD[c:d], g), _trunk(k_LKD[a:b], v_LKD[a:b], g)
        out, lse = _flash(q, k, v, 0.0, False, scale=scale)
        out_AHD, lse_AH = _tokens(out), lse.flatten(0, 1).t()
        merged_AH = torch.logaddexp(lse_LH[c:d], lse_AH)
        share_AH = (lse_AH - merged_AH).exp_()
        out_LHD[c:d].lerp_(out_AHD, share_AH[..., None].to(out_AHD.dtype))
        lse_LH[c:d] = merged_AH
    return out_LHD, lse_LH


def ring_backward(
    grad_LHD: Tensor,
    q_LHD: Tensor,
    k_LKD: Tensor,
    v_LKD: Tensor,
    out_LHD: Tensor,
    lse_LH: Tensor,
    layout: GroupLayout,
    scale: float,
    *,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Writes the gradients by q, k and v to `into` (zeros of their shapes, perhaps views).

    Given the merged output and the merged log-sum-exp, the gradient of each partial attention is
    what the flash backward computes for that part alone: it rebuilds the probabilities from the
    log-sum-exp it is given, and the softmax's row term from output and gradient.
    """
    dq_LHD, dk_LKD, dv_LKD = into
    K = k_LKD.shape[1]
    g = q_LHD.shape[1] // K
    for bucket in layout.buckets:
        q, out, grad = (_segments(x, bucket) for x in (q_LHD, out_LHD, grad_LHD))
        k, v = (_repeat(_segments(x, bucket), g) for x in (k_LKD, v_LKD))
        lse = lse_LH[bucket.padded_ST].transpose(1, 2)
        if not bucket.full:
            grad = grad * bucket.inside_ST[:, None, :, None]
        dq, dk, dv = _flash_backward(grad, q, k, v, out, lse, 0.0, True, scale=scale)
        dk, dv = dk.unflatten(1, (K, g)).sum(2), dv.unflatten(1, (K, g)).sum(2)
        for total, part in ((dq_LHD, dq), (dk_LKD, dk), (dv_LKD, dv)):
            total[bucket.positions] = part.transpose(1, 2)[bucket.inside_ST]
    for branching in layout.branchings:
        (a, b), (c, d) = branching.trunk, branching.branches
        q, out, grad = (_heads(x[c:d], g) for x in (q_LHD, out_LHD, grad_LHD))
        k, v = _trunk(k_LKD[a:b], v_LKD[a:b], g)
        lse = lse_LH[c:d].t().unflatten(0, (K, g))
        dq, dk, dv = _flash_backward(grad, q, k, v, out, lse, 0.0, False, scale=scale)
        dq_LHD[c:d] += _tokens(dq)
        dk_LKD[a:b] += dk.sum(1).transpose(0, 1)
        dv_LKD[a:b] += dv.sum(1).transpose(0, 1)


def takes_stream(q_LHD: Tensor, layout: GroupLayout) -> bool:
    """Whether the kernels for streams of sequences take these heads, and there are no branches of
    an empty trunk."""
    size = q_LHD.shape[2]
    return size % 8 == 0 and size <= 256 and len(layout.branchings) == len(layout.branched)


class _StreamAttention(torch.autograd.Function):
    """The two partial attentions over the stream as it is, one call each (FlashAttention 2)."""

    @staticmethod
    def forward(
        ctx: Any, q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, layout: GroupLayout, scale: float
    ) -> Tensor:
        out_LHD, lse_HL, own_state = _stream(q_LHD, k_LKD, v_LKD, layout.own, True, scale)
        states = [own_state]
        if layout.branchings:
            first, tail = layout.branches[0][0], layout.tail
            shared_AHD, shared_HA, state = _stream(
                q_LHD[first:], k_LKD[:tail], v_LKD[:tail], layout.shared, False, scale
            )
            states.append(state)
            merged_HA = torch.logaddexp(lse_HL[:, first:], shared_HA)
            share_AH1 = (shared_HA - merged_HA).exp_().t()[..., None]
            out_LHD[first:].lerp_(shared_AHD, share_AH1.to(out_LHD.dtype))
            lse_HL[:, first:] = merged_HA
        ctx.save_for_backward(q_LHD, k_LKD, v_LKD, out_LHD, lse_HL)
        ctx.layout, ctx.scale, ctx.states = layout, scale, states
        return out_LHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_LHD: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """As `ring_backward`: each part's own gradient, given the merged output and log-sum-exp."""
        q_LHD, k_LKD, v_LKD, out_LHD, lse_HL = ctx.saved_tensors
        layout, scale, states = ctx.layout, ctx.scale, ctx.states
        grad_LHD = grad_LHD.contiguous()
        dq_LHD, dk_LKD, dv_LKD = _stream_backward(
            grad_LHD, q_LHD, k_LKD, v_LKD, out_LHD, lse_HL, layout.own, True, states[0], scale
        )
        if layout.branchings:
            first, tail = layout.branches[0][0], layout.tail
            dq_AHD, dk_TKD, dv_TKD = _stream_backward(
                grad_LHD[first:],
                q_LHD[first:],
                k_LKD[:tail],
                v_LKD[:tail],
                out_LHD[first:],
                lse_HL[:, first:].contiguous(),
                layout.shared,
                False,
                states[1],
                scale,
            )
            dq_LHD[first:] += dq_AHD
            dk_LKD[:tail] += dk_TKD
            dv_LKD[:tail] += dv_TKD
        return dq_LHD, dk_LKD, dv_LKD, None, None


def _stream(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, causal: bool, scale: float
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Attention within sequences: out [L, H, D], log-sum-exp [H, L], the random state (unused)."""
    s = sequences
    out, lse, *state, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, s.queries, s.keys, s.longest_query, s.longest_key, 0.0, causal, False, scale=scale
    )
    return out, lse, (state[0], state[1])


def _stream_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: Sequences,
    causal: bool,
    state: tuple[Tensor, Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    s = sequences
    return torch.ops.aten._flash_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        lse,
        s.queries,
        s.keys,
        s.longest_query,
        s.longest_key,
        0.0,
        causal,
        *state,
        scale=scale,
    )


def _repeat(x_SKTD: Tensor, g: int) -> Tensor:
    """Keys or values for every query head: [S, K, T, D] -> [S, H, T, D]."""
    return x_SKTD if g == 1 else x_SKTD.repeat_interleave(g, dim=1)


def _heads(x_AHD: Tensor, g: int) -> Tensor:
    """[A, H, D] -> [K, g, A, D]: key-value heads take the batch's place."""
    return x_AHD.transpose(0, 1).unflatten(0, (-1, g))


def _tokens(x_KgAD: Tensor) -> Tensor:
    """[K, g, A, D] -> [A, H, D]."""
    return x_KgAD.flatten(0, 1).transpose(0, 1)


def _trunk(k_TKD: Tensor, v_TKD: Tensor, g: int) -> tuple[Tensor, Tensor]:
    """[T, K, D] -> [K, g, T, D] without a copy, for keys and values."""
    k_KTD, v_KTD = k_TKD.transpose(0, 1), v_TKD.transpose(0, 1)
    return (
        k_KTD[:, None].expand(-1, g, -1, -1),
        v_KTD[:, None].expand(-1, g, -1, -1),
    )

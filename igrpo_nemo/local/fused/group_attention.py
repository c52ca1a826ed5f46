"""Attention over sequences that share a context, which is computed once.

    flat tokens   [trunk 1 | trunk 2 | ... || branches of 1 | branches of 2 | ...]
    every token   attends causally to its own segment (a trunk or one branch)
    branch tokens attend to all of their trunk as well; the two partial softmaxes are merged by
                  their log-sum-exps (as ring attention does, arXiv:2310.01889)

The stream has no padding and there is no token-by-token mask, so that memory and work grow
linearly with the number of branches.

Shape legend: L flat tokens, S segments of a bucket, T tokens of a segment, H query heads, K
key-value heads, g = H / K, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, slots=True)
class Branching:
    """One trunk, [start, end) of the flat tokens, and the contiguous tokens of its branches."""

    trunk: tuple[int, int]
    branches: tuple[int, int]
    branch_lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """Which flat token attends to which: buckets of causal segments, and branchings.

    `tail` begins after the trunks that have branches. A last layer needs queries from there on
    only; `tail_layout()` leaves the others out.
    """

    trunk_buckets: tuple[Bucket, ...]
    tail_buckets: tuple[Bucket, ...]
    branchings: tuple[Branching, ...]
    tail: int

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        return self.trunk_buckets + self.tail_buckets

    def tail_layout(self) -> GroupLayout:
        return replace(self, trunk_buckets=())


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
        _buckets(branched, device), _buckets(alone + branches, device), tuple(branchings), tail
    )


def _buckets(segments: Sequence[tuple[int, int]], device: torch.device) -> tuple[Bucket, ...]:
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

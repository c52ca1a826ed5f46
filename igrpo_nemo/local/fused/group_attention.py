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
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from igrpo_nemo.local.fused.group_layout import Bucket, GroupLayout
from igrpo_nemo.local.fused.stream_attention import StreamAttention, takes_stream

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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
        return cast(Tensor, _RingAttention.apply(q_LHD, k_LKD, v_LKD, layout, scale))
    if torch.is_autocast_enabled(q_LHD.device.type):
        dtype = torch.get_autocast_dtype(q_LHD.device.type)
        q_LHD, k_LKD, v_LKD = q_LHD.to(dtype), k_LKD.to(dtype), v_LKD.to(dtype)
    if q_LHD.dtype in (torch.bfloat16, torch.float16) and takes_stream(q_LHD, layout):
        return cast(Tensor, StreamAttention.apply(q_LHD, k_LKD, v_LKD, layout, scale))
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
        q, k, v, out, lse = ctx.saved_tensors
        dq_LHD, dk_LKD, dv_LKD = grads = [torch.zeros_like(x) for x in (q, k, v)]
        ring_backward(grad_LHD, q, k, v, out, lse, ctx.layout, ctx.scale, into=grads)
        return dq_LHD, dk_LKD, dv_LKD, None, None


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
    into: Sequence[Tensor],
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
    k, v = (x_TKD.transpose(0, 1)[:, None].expand(-1, g, -1, -1) for x_TKD in (k_TKD, v_TKD))
    return k, v

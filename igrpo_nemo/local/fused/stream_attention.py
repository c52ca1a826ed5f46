"""Group attention over the flat stream as it is: PyTorch's FlashAttention 2 (CUDA, half precision).

    every token, within its own segment, causally  ─┐
    branch tokens, before the tokens of their trunk ─┴> merged by their log-sum-exps

Two calls do it for all groups. `torch.nn.attention.varlen` wraps the same kernels without the two
things that are needed here: a backward pass from a merged log-sum-exp, and key lengths.

Shape legend: L flat tokens, A branch tokens, T trunk tokens, H query heads, K key-value heads, D
head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from igrpo_nemo.local.fused.group_layout import GroupLayout, Sequences


def takes_stream(q_LHD: Tensor, layout: GroupLayout) -> bool:
    """Whether the kernels for streams of sequences take these heads, and there are no branches of
    an empty trunk."""
    size = q_LHD.shape[2]
    return size % 8 == 0 and size <= 256 and len(layout.branchings) == len(layout.branched)


class StreamAttention(torch.autograd.Function):
    """The two partial attentions over the stream as it is, one call each (FlashAttention 2)."""

    @staticmethod
    def forward(
        ctx: Any, q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, layout: GroupLayout, scale: float
    ) -> Tensor:
        out_LHD, lse_HL, own_state = stream(q_LHD, k_LKD, v_LKD, layout.own, True, scale)
        states = [own_state]
        if layout.branchings:
            first, tail = layout.branches[0][0], layout.tail
            shared_AHD, shared_HA, state = stream(
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
        whole = (grad_LHD, q_LHD, k_LKD, v_LKD, out_LHD, lse_HL)
        dq_LHD, dk_LKD, dv_LKD = stream_backward(*whole, layout.own, True, states[0], scale)
        if layout.branchings:
            first, tail = layout.branches[0][0], layout.tail
            part = (grad_LHD[first:], q_LHD[first:], k_LKD[:tail], v_LKD[:tail], out_LHD[first:])
            lse_HA = lse_HL[:, first:].contiguous()
            dq_AHD, dk_TKD, dv_TKD = stream_backward(
                *part, lse_HA, layout.shared, False, states[1], scale
            )
            dq_LHD[first:] += dq_AHD
            dk_LKD[:tail] += dk_TKD
            dv_LKD[:tail] += dv_TKD
        return dq_LHD, dk_LKD, dv_LKD, None, None


def stream(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    causal: bool,
    scale: float,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Attention within sequences: out [L, H, D], log-sum-exp [H, L], the random state (unused).

    `key_lengths`, int32, are how many keys of each sequence count; by default all.
    """
    ends, dropout, debug = sequences.arguments, 0.0, False
    out, lse, *state, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, *ends, dropout, causal, debug, scale=scale, seqused_k=key_lengths
    )
    return out, lse, (state[0], state[1])


def stream_backward(
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
    """The gradients by q, k and v, given the output and its log-sum-exp."""
    ends, dropout = sequences.arguments, 0.0
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, *ends, dropout, causal, *state, scale=scale
    )

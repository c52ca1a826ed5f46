"""The operations of a Llama-like decoder as fused autograd functions.

    x --rms_norm_linear--> qkv --rotary_attention--> a --linear--> + x
      --rms_norm_linear--> [gate | up] --swiglu--> --linear--> + x

They keep fewer tensors for the backward pass than the same operations one by one, and on x86 CPUs
they reach oneDNN's float32 matrix products, which use AVX-512 on every vendor's processors.

Shape legend: L flat tokens, I inputs, O outputs of a linear layer, H query heads, K key-value
heads, D head size.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from igrpo_nemo.local.group_attention import GroupLayout, ring_backward, ring_forward


@cache
def _has_onednn() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def matmul_nt(x_LI: Tensor, w_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x @ w^T (+ bias) without autograd: [L, O]."""
    if x_LI.device.type == "cpu" and x_LI.dtype == torch.float32 and _has_onednn():
        x_LI, w_OI = _dense(x_LI), _dense(w_OI)
        return torch.ops.mkldnn._linear_pointwise(x_LI, w_OI, bias_O, "none", [], "")
    return F.linear(x_LI, w_OI, bias_O)


def _dense(matrix: Tensor) -> Tensor:
    """A matrix without gaps, by rows or by columns: for others oneDNN is a thousand times slower."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def _weight_grad(grad_LO: Tensor, x_LI: Tensor) -> Tensor:
    """grad^T @ x: [O, I]. The longer side goes along the rows of the product: that is faster."""
    if grad_LO.shape[1] > x_LI.shape[1]:
        return matmul_nt(x_LI.t(), grad_LO.t()).t()
    return matmul_nt(grad_LO.t(), x_LI.t())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_LI: Tensor, w_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_LI, w_OI)
        return matmul_nt(x_LI, w_OI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_LO: Tensor) -> tuple[Tensor, Tensor]:
        x_LI, w_OI = ctx.saved_tensors
        return matmul_nt(grad_LO, w_OI.t()), _weight_grad(grad_LO, x_LI)


def linear(x_LI: Tensor, w_OI: Tensor) -> Tensor:
    """x @ w^T: [L, O]."""
    out = _Linear.apply(x_LI, w_OI)
    assert isinstance(out, Tensor)
    return out


def unit_rms(x_LI: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x divided by its root mean square, and the reciprocal: [L, I], [L, 1]."""
    scale_L1 = torch.linalg.vector_norm(x_LI, dim=-1, keepdim=True)
    scale_L1.square_().div_(x_LI.shape[-1]).add_(eps).rsqrt_()
    return x_LI * scale_L1, scale_L1


class _RmsNormLinear(torch.autograd.Function):
    """(norm * x / rms(x)) @ w^T + b, with the norm's weight folded into the matrix."""

    @staticmethod
    def forward(
        ctx: Any, x_LI: Tensor, norm_I: Tensor, w_OI: Tensor, bias_O: Tensor | None, eps: float
    ) -> Tensor:
        unit_LI, scale_L1 = unit_rms(x_LI, eps)
        ctx.save_for_backward(unit_LI, scale_L1, norm_I, w_OI)
        ctx.has_bias = bias_O is not None
        return matmul_nt(unit_LI, w_OI * norm_I, bias_O)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_LO: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None]:
        unit_LI, scale_L1, norm_I, w_OI = ctx.saved_tensors
        folded_OI = _weight_grad(grad_LO, unit_LI)
        # d(x / rms): the part of the gradient along x cancels.
        grad_LI = matmul_nt(grad_LO, (w_OI * norm_I).t())
        along_L1 = torch.linalg.vecdot(grad_LI, unit_LI).div_(unit_LI.shape[1]).unsqueeze(1)
        grad_LI.addcmul_(unit_LI, along_L1, value=-1).mul_(scale_L1)
        return (
            grad_LI,
            (folded_OI * w_OI).sum(0),
            folded_OI * norm_I,
            grad_LO.sum(0) if ctx.has_bias else None,
            None,
        )


def rms_norm_linear(
    x_LI: Tensor, norm_I: Tensor, w_OI: Tensor, bias_O: Tensor | None, eps: float
) -> Tensor:
    """RMSNorm with weight `norm_I`, then a linear layer: [L, O]."""
    out = _RmsNormLinear.apply(x_LI, norm_I, w_OI, bias_O, eps)
    assert isinstance(out, Tensor)
    return out


class _SwiGluLinear(torch.autograd.Function):
    """(silu(gate) * up) @ w^T from [gate | up]; the product is made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, w_OI: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, w_OI)
        gate, up = gate_up.chunk(2, dim=-1)
        return matmul_nt(F.silu(gate).mul_(up), w_OI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_LO: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, w_OI = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grads = torch.empty_like(gate_up)
        grad_gate, grad_up = grads.chunk(2, dim=-1)
        grad_LI = matmul_nt(grad_LO, w_OI.t())
        sigmoid = torch.sigmoid(gate)
        silu = sigmoid * gate
        torch.mul(grad_LI, silu, out=grad_up)
        grad_w_OI = _weight_grad(grad_LO, silu * up)
        # d silu = sigmoid + silu * (1 - sigmoid)
        slope = silu.addcmul_(silu, sigmoid, value=-1).add_(sigmoid)
        torch.mul(slope.mul_(up), grad_LI, out=grad_gate)
        return grads, grad_w_OI


def swiglu_linear(gate_up: Tensor, w_OI: Tensor) -> Tensor:
    """silu(gate) * up of [L, 2 I] = [gate | up], then a linear layer: [L, O]."""
    out = _SwiGluLinear.apply(gate_up, w_OI)
    assert isinstance(out, Tensor)
    return out


def rotate_(x_LHD: Tensor, cos_L1: Tensor, sin_L1: Tensor) -> None:
    """Rotary position embedding in place; halves of a head are its real and imaginary parts.

    cos and sin: [L, 1, D / 2]. With -sin it is the inverse, and the transpose.
    """
    real, imaginary = x_LHD.chunk(2, dim=-1)
    crossed = imaginary * sin_L1
    imaginary.mul_(cos_L1).addcmul_(real, sin_L1)
    real.mul_(cos_L1).sub_(crossed)


def split_heads(
    qkv_LX: Tensor, heads: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of [L, (H + 2 K) * D]: queries, keys, values, and the part that is rotated (q, k)."""
    H, K = heads
    all_heads = qkv_LX.unflatten(1, (H + 2 * K, -1))
    q_LHD, k_LKD, v_LKD = all_heads.split([H, K, K], dim=1)
    return q_LHD, k_LKD, v_LKD, all_heads[:, : H + K]


class _RotaryAttention(torch.autograd.Function):
    """Rotates queries and keys inside `qkv_LX`, which nothing else needs, and attends in groups."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv_LX: Tensor,
        cos_L1: Tensor,
        sin_L1: Tensor,
        layout: GroupLayout,
        heads: tuple[int, int],
        scale: float,
    ) -> Tensor:
        q_LHD, k_LKD, v_LKD, rotated = split_heads(qkv_LX, heads)
        rotate_(rotated, cos_L1, sin_L1)
        out_LHD, lse_LH = ring_forward(q_LHD, k_LKD, v_LKD, layout, scale)
        ctx.save_for_backward(qkv_LX, cos_L1, sin_L1, out_LHD, lse_LH)
        ctx.layout, ctx.heads, ctx.scale = layout, heads, scale
        return out_LHD.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_LX: Tensor
    ) -> tuple[Tensor, None, None, None, None, None]:
        qkv_LX, cos_L1, sin_L1, out_LHD, lse_LH = ctx.saved_tensors
        q_LHD, k_LKD, v_LKD, _ = split_heads(qkv_LX, ctx.heads)
        grads_LX = torch.zeros_like(qkv_LX)
        dq_LHD, dk_LKD, dv_LKD, rotated = split_heads(grads_LX, ctx.heads)
        ring_backward(
            grad_LX.view_as(out_LHD), q_LHD, k_LKD, v_LKD, out_LHD, lse_LH, ctx.layout, ctx.scale,
            into=(dq_LHD, dk_LKD, dv_LKD),
        )
        rotate_(rotated, cos_L1, -sin_L1)
        return grads_LX, None, None, None, None, None


def rotary_attention(
    qkv_LX: Tensor,
    cos_L1: Tensor,
    sin_L1: Tensor,
    layout: GroupLayout,
    heads: tuple[int, int],
    scale: float,
) -> Tensor:
    """Rotary group attention of [L, (H + 2 K) * D] = [q | k | v]: [L, H * D].

    Overwrites `qkv_LX` with the rotated queries and keys. cos and sin: [L, 1, D / 2].
    """
    out_LX = _RotaryAttention.apply(qkv_LX, cos_L1, sin_L1, layout, heads, scale)
    assert isinstance(out_LX, Tensor)
    return out_LX

"""The operations of a Llama-like decoder as fused autograd functions.

    x --rms_norm_linear--> qkv --rotary_attention--> a --linear--> + x --gated_mlp--> x

They keep fewer tensors for the backward pass than the same operations one by one, and on x86 CPUs
they reach oneDNN's float32 matrix products, which use AVX-512 on every vendor's processors.

Shape legend: L flat tokens, I inputs, O outputs of a linear layer, H query heads, K key-value
heads, D head size.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from igrpo_nemo.local.fused.group_attention import ring_backward, ring_forward
from igrpo_nemo.local.fused.group_layout import GroupLayout

# Tokens of a block of the MLP.
_BLOCK = 512
# Multiplications below which oneDNN's start costs more than it gains.
_SMALLEST_ONEDNN_PRODUCT = 1 << 20


@cache
def _has_onednn() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def matmul_nt(x_LI: Tensor, w_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x @ w^T (+ bias) without autograd, in the precision of w: [L, O]."""
    x_LI = x_LI.to(w_OI.dtype)
    large = x_LI.shape[0] * w_OI.numel() >= _SMALLEST_ONEDNN_PRODUCT
    if large and x_LI.device.type == "cpu" and x_LI.dtype == torch.float32 and _has_onednn():
        x_LI, w_OI = _dense(x_LI), _dense(w_OI)
        return torch.ops.mkldnn._linear_pointwise(x_LI, w_OI, bias_O, "none", [], "")
    return F.linear(x_LI, w_OI, bias_O)


def _dense(matrix: Tensor) -> Tensor:
    """A matrix without gaps, by rows or columns: for others oneDNN is a thousand times slower."""
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
    return cast(Tensor, _Linear.apply(x_LI, w_OI))


def unit_rms(x_LI: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x divided by its root mean square, and the reciprocal: [L, I], [L, 1]."""
    scale_L1 = torch.linalg.vector_norm(x_LI, dim=-1, keepdim=True)
    scale_L1.square_().div_(x_LI.shape[-1]).add_(eps).rsqrt_()
    return x_LI * scale_L1, scale_L1


def _unit_rms_grad(grad_LI: Tensor, unit_LI: Tensor, scale_L1: Tensor) -> Tensor:
    """The gradient by x of x / rms(x), in place of `grad_LI`: its part along x cancels."""
    along_L1 = torch.linalg.vecdot(grad_LI, unit_LI).div_(unit_LI.shape[1]).unsqueeze(1)
    return grad_LI.addcmul_(unit_LI, along_L1, value=-1).mul_(scale_L1)


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
    def backward(ctx: Any, grad_LO: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None]:
        unit_LI, scale_L1, norm_I, w_OI = ctx.saved_tensors
        folded_OI = _weight_grad(grad_LO, unit_LI)
        grad_LI = matmul_nt(grad_LO, (w_OI * norm_I).t())
        return (
            _unit_rms_grad(grad_LI, unit_LI, scale_L1),
            (folded_OI * w_OI).sum(0),
            folded_OI * norm_I,
            grad_LO.sum(0) if ctx.has_bias else None,
            None,
        )


def rms_norm_linear(
    x_LI: Tensor, norm_I: Tensor, w_OI: Tensor, bias_O: Tensor | None, eps: float
) -> Tensor:
    """RMSNorm with weight `norm_I`, then a linear layer: [L, O]."""
    return cast(Tensor, _RmsNormLinear.apply(x_LI, norm_I, w_OI, bias_O, eps))


class _GatedMlp(torch.autograd.Function):
    """x + (silu(gate) * up) @ down^T, where [gate | up] = (norm * x / rms(x)) @ gate_up^T.

    Works through blocks of tokens, whose intermediates stay in the processor's cache, and makes
    them again in the backward pass: that costs less time than writing and reading them would, and
    only x is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x_LI: Tensor, norm_I: Tensor, gate_up: Tensor, down: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x_LI, norm_I, gate_up, down)
        ctx.eps = eps
        folded = gate_up * norm_I
        out_LI = torch.empty_like(x_LI)
        for x, out in zip(x_LI.split(_BLOCK), out_LI.split(_BLOCK), strict=True):
            gate, up = matmul_nt(unit_rms(x, eps)[0], folded).chunk(2, dim=-1)
            torch.add(x, matmul_nt(F.silu(gate).mul_(up), down), out=out)
        return out_LI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_LI: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x_LI, norm_I, gate_up, down = ctx.saved_tensors
        folded = gate_up * norm_I
        grad_x_LI = torch.empty_like(x_LI)
        grad_folded, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        blocks = (tensor.split(_BLOCK) for tensor in (x_LI, grad_LI.contiguous(), grad_x_LI))
        for x, grad, grad_x in zip(*blocks, strict=True):
            unit, scale = unit_rms(x, ctx.eps)
            gate, up = matmul_nt(unit, folded).chunk(2, dim=-1)
            grad_hidden = matmul_nt(grad, down.t())
            sigmoid = torch.sigmoid(gate)
            silu = sigmoid * gate
            grad_down += _weight_grad(grad, silu * up)
            grad_gate_up = grad.new_empty(len(grad), len(gate_up))
            grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
            torch.mul(grad_hidden, silu, out=grad_up)
            # d silu = sigmoid + silu * (1 - sigmoid)
            slope = silu.addcmul_(silu, sigmoid, value=-1).add_(sigmoid).mul_(up)
            torch.mul(slope, grad_hidden, out=grad_gate)
            grad_folded += _weight_grad(grad_gate_up, unit)
            grad_unit = matmul_nt(grad_gate_up, folded.t())
            torch.add(grad, _unit_rms_grad(grad_unit, unit, scale), out=grad_x)
        return grad_x_LI, (grad_folded * gate_up).sum(0), grad_folded * norm_I, grad_down, None


def gated_mlp(x_LI: Tensor, norm_I: Tensor, gate_up: Tensor, down: Tensor, eps: float) -> Tensor:
    """x plus the SwiGLU block of its RMSNorm; gate_up [2 O, I] stacks gate and up, down [I, O]."""
    return cast(Tensor, _GatedMlp.apply(x_LI, norm_I, gate_up, down, eps))


def rotate_(x_LHD: Tensor, cos_L1: Tensor, sin_L1: Tensor) -> None:
    """Rotary position embedding in place; halves of a head are its real and imaginary parts.

    cos and sin: [L, 1, D / 2], of x's dtype. With -sin it is the inverse, and the transpose.
    """
    real, imaginary = x_LHD.chunk(2, dim=-1)
    crossed = imaginary * sin_L1
    imaginary.mul_(cos_L1).addcmul_(real, sin_L1)
    real.mul_(cos_L1).sub_(crossed)


def split_heads(qkv_LX: Tensor, heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    def backward(ctx: Any, grad_LX: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        qkv_LX, cos_L1, sin_L1, out_LHD, lse_LH = ctx.saved_tensors
        grads_LX = torch.zeros_like(qkv_LX)
        *of_qkv, rotated = split_heads(grads_LX, ctx.heads)
        saved = (*split_heads(qkv_LX, ctx.heads)[:3], out_LHD, lse_LH)
        ring_backward(grad_LX.view_as(out_LHD), *saved, ctx.layout, ctx.scale, into=of_qkv)
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
    return cast(Tensor, _RotaryAttention.apply(qkv_LX, cos_L1, sin_L1, layout, heads, scale))

"""Token entropy (Eq. 7) and token log-probabilities, without a second logits-sized tensor.

    logits --row maximum--> m --chunks of the vocabulary--> sum e^(z-m), sum (z-m) e^(z-m) --> H
                                                        \\-> log sum e^z --> log p(token)

A chunk's work space is T x chunk_size; inputs may be bf16, sums are fp32 (fp64 for fp64 inputs).
Log-probs save the logits themselves for the backward pass, which allocates only the gradient.
Shapes: T tokens, V vocabulary, C vocabulary entries of a chunk, R rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_SIZE = 4096
"""Vocabulary entries per chunk: 16 KiB of work space per token and buffer in fp32."""


@torch.no_grad()
def token_entropy(
    logits_TV: Tensor, chunk_size: int = CHUNK_SIZE, *, temperature: float = 1.0
) -> Tensor:
    """Exact entropy of each token's distribution, in nats (Eq. 7): H = -sum_v p_v log p_v.

    With d = z / temperature - max: H = log sum e^d - (sum d e^d) / (sum e^d), which keeps its
    precision for large logits, as every d is at most 0. A logit of -inf contributes 0.

    Args:
        logits_TV: any float dtype; not modified.
        temperature: of the softmax; dividing here saves the caller a copy of the logits.

    Returns: entropy_T in fp32 (fp64 for fp64 logits), without gradient.

    Raises ValueError for a wrong shape, chunk size or temperature.
    """
    _check(logits_TV, chunk_size, temperature)
    max_T, sum_T = _max_and_zeros(logits_TV)
    weighted_T = torch.zeros_like(sum_T)
    shifted, exp = _buffers(logits_TV, chunk_size, sum_T.dtype, count=2)
    for chunk_TC in logits_TV.split(chunk_size, dim=1):
        shifted_TC = _shift(chunk_TC, max_T, temperature, shifted)
        exp_TC = torch.exp(shifted_TC, out=exp[:, : chunk_TC.shape[1]])
        sum_T += exp_TC.sum(dim=1)
        weighted_T += shifted_TC.mul_(exp_TC).sum(dim=1)
    return sum_T.log() - weighted_T / sum_T


def token_logprobs(
    logits_TV: Tensor, ids_T: Tensor, *, temperature: float = 1.0, chunk_size: int = CHUNK_SIZE
) -> Tensor:
    """log softmax(logits / temperature)[t, ids[t]], differentiable once with respect to the logits.

    Equals `log_softmax(...).gather(...)`, which holds two logits-sized tensors in fp32 for the
    backward pass; this one holds none.

    Args:
        logits_TV: any float dtype; not modified, and kept alive until the backward pass.
        ids_T: int64 token ids.

    Returns: logprobs_T in fp32 (fp64 for fp64 logits). The gradient has the logits' dtype.

    Raises ValueError for a wrong shape, chunk size or temperature.
    """
    _check(logits_TV, chunk_size, temperature)
    if ids_T.shape != logits_TV.shape[:1]:
        raise ValueError(
            f"ids of shape {tuple(ids_T.shape)} do not fit logits of shape {tuple(logits_TV.shape)}"
        )
    logprobs_T = _TokenLogprobs.apply(logits_TV, ids_T, temperature, chunk_size)
    assert isinstance(logprobs_T, Tensor)
    return logprobs_T


def sampled_entropy(logprobs: Tensor, lengths_R: Tensor | None = None) -> Tensor:
    """-mean log p of the sampled tokens: an estimate of the mean entropy, in nats.

    Unbiased where the tokens were drawn from the untruncated softmax that the log-probs are of.

    Args:
        logprobs: logprobs_T of sampled tokens, or logprobs_RT padded on the right with lengths_R.

    Returns: a scalar without gradient.

    Raises ValueError when there are no tokens.
    """
    logprobs = logprobs.detach()
    if lengths_R is not None:
        positions_T = torch.arange(logprobs.shape[1], device=logprobs.device)
        logprobs = logprobs[positions_T < lengths_R[:, None]]
    if logprobs.numel() == 0:
        raise ValueError("sampled_entropy needs at least one token")
    return -logprobs.mean(dtype=_sum_dtype(logprobs))


class _TokenLogprobs(torch.autograd.Function):
    """log p(id) = z_id - log sum e^z; its gradient by z_v is 1[v = id] - p_v."""

    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, ids_T: Tensor, temperature: float, chunk_size: int
    ) -> Tensor:
        max_T, sum_T = _max_and_zeros(logits_TV)
        (buffer,) = _buffers(logits_TV, chunk_size, sum_T.dtype, count=1)
        for chunk_TC in logits_TV.split(chunk_size, dim=1):
            sum_T += _shift(chunk_TC, max_T, temperature, buffer).exp_().sum(dim=1)
        log_sum_T = sum_T.log()
        ctx.save_for_backward(logits_TV, ids_T, max_T, log_sum_T)
        ctx.temperature = temperature
        ctx.chunk_size = chunk_size
        chosen_T = logits_TV.gather(1, ids_T[:, None])[:, 0].to(sum_T.dtype)
        # Subtracting the maximum first keeps fp32's digits where logits are large.
        return (chosen_T - max_T) / temperature - log_sum_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None, None]:
        logits_TV, ids_T, max_T, log_sum_T = ctx.saved_tensors
        grad_T = grad_T / ctx.temperature
        grad_TV = torch.empty_like(logits_TV)
        (buffer,) = _buffers(logits_TV, ctx.chunk_size, log_sum_T.dtype, count=1)
        for chunk_TC, out_TC in zip(
            logits_TV.split(ctx.chunk_size, dim=1),
            grad_TV.split(ctx.chunk_size, dim=1),
            strict=True,
        ):
            probs_TC = _shift(chunk_TC, max_T, ctx.temperature, buffer)
            probs_TC.sub_(log_sum_T[:, None]).exp_()
            out_TC.copy_(probs_TC.mul_(-grad_T[:, None]))
        # 1 - p for the sampled token, computed in one piece: adding 1 to a bf16 -p would round.
        chosen_T = logits_TV.gather(1, ids_T[:, None])[:, 0].to(max_T.dtype)
        logprobs_T = (chosen_T - max_T) / ctx.temperature - log_sum_T
        at_ids_T = -torch.expm1(logprobs_T) * grad_T
        # Not scatter_: on the CPU it allocates an fp32 tensor as large as the logits.
        rows_T = torch.arange(ids_T.shape[0], device=ids_T.device)
        grad_TV[rows_T, ids_T] = at_ids_T.to(grad_TV.dtype)
        return grad_TV, None, None, None


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _max_and_zeros(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    """The row maximum, exact in any dtype, and a zero accumulator beside it."""
    max_T = logits_TV.amax(dim=1).to(_sum_dtype(logits_TV))
    return max_T, torch.zeros_like(max_T)


def _buffers(logits_TV: Tensor, chunk_size: int, dtype: torch.dtype, count: int) -> list[Tensor]:
    """Work space used by every chunk in turn: fresh pages per chunk cost more than the sums."""
    tokens, vocabulary = logits_TV.shape
    shape = (tokens, min(chunk_size, vocabulary))
    return [torch.empty(shape, dtype=dtype, device=logits_TV.device) for _ in range(count)]


def _shift(chunk_TC: Tensor, max_T: Tensor, temperature: float, buffer: Tensor) -> Tensor:
    """(z - max) / temperature in the buffer; finite also for z = -inf, so that 0 * d stays 0."""
    shifted_TC = buffer[:, : chunk_TC.shape[1]].copy_(chunk_TC).sub_(max_T[:, None])
    if temperature != 1.0:
        shifted_TC.div_(temperature)
    return shifted_TC.clamp_(min=torch.finfo(shifted_TC.dtype).min)


def _check(logits_TV: Tensor, chunk_size: int, temperature: float) -> None:
    if logits_TV.ndim != 2 or logits_TV.shape[1] == 0 or not logits_TV.is_floating_point():
        raise ValueError(f"logits must be floats of shape (tokens, vocabulary), got {logits_TV!r}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature} must be positive")

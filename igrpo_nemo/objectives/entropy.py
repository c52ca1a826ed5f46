"""Token entropy (Eq. 7) and token log-probabilities, without a second logits-sized tensor.

    logits --row maximum m--> chunks of the vocabulary --> sum e^(z-m), sum (z-m) e^(z-m) --> H
                                                       \\-> log sum e^z --> log p(token)

Work space is one block of rows x chunk of the vocabulary, of constant size. Inputs may be bf16,
sums are fp32 (fp64 for fp64 inputs). Log-probs save the logits themselves for the backward pass.
Shapes: T tokens, B tokens of a block, V vocabulary, C vocabulary entries of a chunk, R rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_SIZE = 4096
"""Vocabulary entries per chunk."""

_BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**25}
"""Elements of a buffer: on the CPU 1 MiB stays in the cache, on a GPU 128 MiB keep kernels few."""


@torch.no_grad()
def token_entropy(
    logits_TV: Tensor, chunk_size: int = CHUNK_SIZE, *, temperature: float = 1.0
) -> Tensor:
    """Exact entropy of each token's distribution, in nats (Eq. 7): H = -sum_v p_v log p_v.

    With d = z / temperature - max: H = log sum e^d - (sum d e^d) / (sum e^d), which keeps its
    precision for large logits, as every d is at most 0. A logit of -inf contributes 0.

    Logits of any float dtype are not modified. Returns entropy_T in fp32 (fp64 for fp64 logits),
    without gradient.
    """
    max_T, sum_T = _max_and_zeros(logits_TV)
    weighted_T = torch.zeros_like(sum_T)
    lowest = torch.finfo(sum_T.dtype).min
    exp_buffer: Tensor | None = None
    for rows, _, shifted_BC in _shifted_chunks(logits_TV, max_T, temperature, chunk_size):
        if exp_buffer is None:
            exp_buffer = torch.empty_like(shifted_BC)
        exp_BC = exp_buffer[: shifted_BC.shape[0], : shifted_BC.shape[1]]
        torch.exp(shifted_BC.clamp_(min=lowest), out=exp_BC)  # -inf would give 0 * inf = nan
        sum_T[rows] += exp_BC.sum(dim=1)
        weighted_T[rows] += shifted_BC.mul_(exp_BC).sum(dim=1)
    return sum_T.log() - weighted_T / sum_T


def token_logprobs(
    logits_TV: Tensor, ids_T: Tensor, *, temperature: float = 1.0, chunk_size: int = CHUNK_SIZE
) -> Tensor:
    """log softmax(logits / temperature)[t, ids[t]], differentiable once with respect to the logits.

    Equals `log_softmax(...).gather(...)`, which holds two logits-sized tensors in fp32 for the
    backward pass; this one holds none.

    Logits of any float dtype are not modified, and kept alive until the backward pass. Returns
    logprobs_T in fp32 (fp64 for fp64 logits). The gradient has the logits' dtype.
    """
    return cast(Tensor, _TokenLogprobs.apply(logits_TV, ids_T, temperature, chunk_size))


class _TokenLogprobs(torch.autograd.Function):
    """log p(id) = z_id - log sum e^z; its gradient by z_v is 1[v = id] - p_v."""

    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, ids_T: Tensor, temperature: float, chunk_size: int
    ) -> Tensor:
        max_T, sum_T = _max_and_zeros(logits_TV)
        for rows, _, shifted_BC in _shifted_chunks(logits_TV, max_T, temperature, chunk_size):
            sum_T[rows] += shifted_BC.exp_().sum(dim=1)
        chosen_T = logits_TV.gather(1, ids_T[:, None])[:, 0].to(sum_T.dtype)
        # Subtracting the maximum first keeps fp32's digits where logits are large.
        logprobs_T = (chosen_T - max_T) / temperature - sum_T.log()
        ctx.save_for_backward(logits_TV, ids_T, max_T, sum_T, logprobs_T)
        ctx.temperature = temperature
        ctx.chunk_size = chunk_size
        return logprobs_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None, None]:
        logits_TV, ids_T, max_T, sum_T, logprobs_T = ctx.saved_tensors
        grad_T = grad_T / ctx.temperature
        factor_T1 = (-grad_T / sum_T)[:, None]
        grad_TV = torch.empty_like(logits_TV)
        for rows, columns, shifted_BC in _shifted_chunks(
            logits_TV, max_T, ctx.temperature, ctx.chunk_size
        ):
            grad_TV[rows, columns] = shifted_BC.exp_().mul_(factor_T1[rows])
        # 1 - p of the sampled token in one piece: adding 1 to a bf16 -p would round it.
        at_ids_T = -torch.expm1(logprobs_T) * grad_T
        # Not scatter_: on the CPU it allocates an fp32 tensor as large as the logits.
        rows_T = torch.arange(ids_T.shape[0], device=ids_T.device)
        grad_TV[rows_T, ids_T] = at_ids_T.to(grad_TV.dtype)
        return grad_TV, None, None, None


def _shifted_chunks(
    logits_TV: Tensor, max_T: Tensor, temperature: float, chunk_size: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, (z - max) / temperature there), the last in a buffer that is used again.

    Every step overwrites what the one before it gave out; the first buffer is the largest.
    """
    tokens, vocabulary = logits_TV.shape
    chunk_size = min(chunk_size, vocabulary)
    elements = _BLOCK_ELEMENTS.get(logits_TV.device.type, _BLOCK_ELEMENTS["cuda"])
    block_size = min(max(elements // chunk_size, 1), tokens)
    buffer = torch.empty((block_size, chunk_size), dtype=max_T.dtype, device=logits_TV.device)
    for row in range(0, tokens, max(block_size, 1)):
        rows = slice(row, min(row + block_size, tokens))
        for column in range(0, vocabulary, chunk_size):
            columns = slice(column, min(column + chunk_size, vocabulary))
            chunk_BC = logits_TV[rows, columns]
            shifted_BC = buffer[: chunk_BC.shape[0], : chunk_BC.shape[1]]
            if chunk_BC.dtype == buffer.dtype:
                torch.sub(chunk_BC, max_T[rows, None], out=shifted_BC)
            else:
                # Subtracting tensors of two dtypes would allocate a converted copy.
                shifted_BC.copy_(chunk_BC).sub_(max_T[rows, None])
            if temperature != 1.0:
                shifted_BC.div_(temperature)
            yield rows, columns, shifted_BC


def _max_and_zeros(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    """The row maximum, exact in any dtype, and a zero accumulator beside it."""
    sums = torch.float64 if logits_TV.dtype == torch.float64 else torch.float32
    max_T = logits_TV.amax(dim=1).to(sums)
    return max_T, torch.zeros_like(max_T)

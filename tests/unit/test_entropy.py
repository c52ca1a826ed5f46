"""Entropy and log-probs against torch's own softmax, and their memory against what they claim."""

import math
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from igrpo_nemo.objectives.entropy import token_entropy, token_logprobs


def random_logits(tokens: int, vocabulary: int, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens * 1000 + vocabulary)
    return scale * torch.randn((tokens, vocabulary), generator=generator, dtype=torch.float64)


def direct_entropy(logits: torch.Tensor) -> torch.Tensor:
    logprobs = logits.double().log_softmax(-1)
    return -(logprobs.exp() * logprobs).nan_to_num(0.0).sum(-1)


def direct_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "chunk_size"),
    [*((5, 13, chunk) for chunk in (*range(1, 14), 4096)), (901, 1_500, 700), (901, 1_500, 4096)],
)
def test_entropy_and_log_probs_do_not_depend_on_the_chunk_size(
    tokens: int, vocabulary: int, chunk_size: int
) -> None:
    """The last ones have more tokens than fit a block."""
    logits = random_logits(tokens, vocabulary)
    ids = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))
    ids[:2] = torch.tensor([0, vocabulary - 1])
    torch.testing.assert_close(
        token_entropy(logits, chunk_size), direct_entropy(logits), rtol=1e-12, atol=1e-14
    )
    leaf, reference = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    got, wanted = token_logprobs(leaf, ids, chunk_size=chunk_size), direct_logprobs(reference, ids)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)
    weights = torch.linspace(-1, 1, tokens, dtype=torch.float64)
    (grad,) = torch.autograd.grad((got * weights).sum(), leaf)
    (wanted_grad,) = torch.autograd.grad((wanted * weights).sum(), reference)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-12, atol=1e-14)


def test_no_tokens_give_no_values() -> None:
    logits = torch.empty(0, 7, requires_grad=True)
    assert token_entropy(logits).shape == (0,)
    logprobs = token_logprobs(logits, torch.empty(0, dtype=torch.int64))
    (grad,) = torch.autograd.grad(logprobs.sum(), logits)
    assert grad.shape == (0, 7)


def test_log_probs_pass_gradcheck() -> None:
    logits = random_logits(3, 7).requires_grad_()
    ids = torch.tensor([6, 0, 2])
    assert torch.autograd.gradcheck(
        lambda z: token_logprobs(z, ids, temperature=0.7, chunk_size=3), (logits,)
    )


def test_entropy_of_known_distributions() -> None:
    uniform = torch.zeros(1, 50)
    assert float(token_entropy(uniform, 7)) == pytest.approx(math.log(50), rel=1e-6)
    certain = torch.full((1, 50), -1e4).index_fill_(1, torch.tensor([3]), 1e4)
    assert float(token_entropy(certain, 7)) == 0.0
    coin = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log() + 123.0
    wanted = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert float(token_entropy(coin, 1)) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_masked_logits_contribute_nothing(dtype: torch.dtype, chunk_size: int) -> None:
    """Also where a whole chunk, and where all of the vocabulary but one, is masked."""
    logits = random_logits(3, 9).to(dtype)
    logits[0, :4] = -math.inf
    logits[1, 5:] = -math.inf
    logits[2, 1:] = -math.inf
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(
        token_entropy(logits, chunk_size).double(), direct_entropy(logits), rtol=0, atol=tolerance
    )
    leaf = logits.clone().requires_grad_()
    ids = torch.tensor([5, 2, 0])
    got = token_logprobs(leaf, ids, chunk_size=chunk_size)
    torch.testing.assert_close(
        got.detach().double(), direct_logprobs(logits.double(), ids), rtol=0, atol=tolerance
    )
    (grad,) = torch.autograd.grad(got.sum(), leaf)
    assert bool((grad[torch.isinf(logits)] == 0).all())
    assert bool(torch.isfinite(grad).all())


def test_bf16_logits_are_summed_in_fp32() -> None:
    logits = random_logits(4, 20_000).bfloat16()
    ids = torch.tensor([0, 19_999, 77, 4_096])
    exact = logits.double()
    entropy = token_entropy(logits)
    assert entropy.dtype == torch.float32
    torch.testing.assert_close(entropy.double(), direct_entropy(exact), rtol=1e-5, atol=0)
    leaf = logits.clone().requires_grad_()
    got = token_logprobs(leaf, ids)
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got.detach().double(), direct_logprobs(exact, ids), rtol=1e-5, atol=0
    )
    (grad,) = torch.autograd.grad(got.sum(), leaf)
    wanted = torch.nn.functional.one_hot(ids, 20_000) - exact.softmax(-1)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad.double(), wanted, rtol=2**-7, atol=1e-30)


def test_large_logits_lose_no_digits() -> None:
    logits = random_logits(6, 40).float()
    ids = torch.arange(6)
    shifted = logits + 4096.0  # exact in fp32 for what the addition itself keeps
    logits = shifted - 4096.0
    torch.testing.assert_close(token_entropy(shifted), token_entropy(logits), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        token_logprobs(shifted, ids), token_logprobs(logits, ids), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 2.5])
def test_temperature_divides_the_logits(temperature: float) -> None:
    logits = random_logits(4, 11)
    before = logits.clone()
    ids = torch.tensor([1, 2, 3, 10])
    torch.testing.assert_close(
        token_entropy(logits, 4, temperature=temperature), direct_entropy(logits / temperature)
    )
    torch.testing.assert_close(
        token_logprobs(logits, ids, temperature=temperature, chunk_size=4),
        direct_logprobs(logits / temperature, ids),
    )
    assert torch.equal(logits, before)


def test_entropy_has_no_gradient_and_inputs_stay_as_they_are() -> None:
    logits = random_logits(4, 11).float().requires_grad_()
    before = logits.detach().clone()
    assert not token_entropy(logits, 3).requires_grad
    token_logprobs(logits, torch.tensor([1, 2, 3, 4]), chunk_size=3).sum().backward()
    assert torch.equal(logits.detach(), before)


def allocated(function) -> tuple[int, int]:
    """Peak bytes above the start, and largest single allocation, of CPU tensors in a call.

    The profiler reports each allocation and release, also of buffers inside an operator.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = function()
    live = peak = largest = 0
    profiler: Any = trace.profiler  # its events are untyped
    events = [each for each in profiler.kineto_results.events() if each.name() == "[memory]"]
    assert events, "the profiler saw no allocation: this check would prove nothing"
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak, largest = max(peak, live), max(largest, event.nbytes())
    del result
    return peak, largest


TOKENS, VOCABULARY, CHUNK = 512, 16_384, 512
BUFFER_BYTES = 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_passes_allocate_no_second_logits(dtype: torch.dtype) -> None:
    logits = torch.randn(TOKENS, VOCABULARY).to(dtype).requires_grad_()
    ids = torch.arange(TOKENS)
    logits_bytes = logits.numel() * logits.element_size()
    assert logits_bytes >= 16 * BUFFER_BYTES

    peak, _ = allocated(lambda: token_entropy(logits, CHUNK))
    assert peak < 2.1 * BUFFER_BYTES
    peak, _ = allocated(lambda: token_logprobs(logits, ids, chunk_size=CHUNK))
    assert peak < 1.1 * BUFFER_BYTES

    plain, _ = allocated(lambda: direct_logprobs(logits, ids))
    assert plain >= logits_bytes, "the measure must see what the plain form allocates"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_pass_allocates_the_gradient_and_one_buffer(dtype: torch.dtype) -> None:
    logits = torch.randn(TOKENS, VOCABULARY).to(dtype).requires_grad_()
    logprobs = token_logprobs(logits, torch.arange(TOKENS), chunk_size=CHUNK)
    gradient_bytes = logits.numel() * logits.element_size()
    peak, largest = allocated(lambda: torch.autograd.grad(logprobs.sum(), logits))
    assert largest == gradient_bytes
    assert peak < gradient_bytes + 1.1 * BUFFER_BYTES

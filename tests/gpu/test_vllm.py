"""The embedded engine's sampler on vLLM, on a GPU: the policy that learns is the one that samples.

One engine for all tests, with CUDA graphs, which sleep must leave intact.
"""

from __future__ import annotations

import math
import time

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from igrpo_nemo.errors import UserError
from igrpo_nemo.local.packing import completion_logprobs
from igrpo_nemo.local.sampler import SampleRequest, SamplingParams
from igrpo_nemo.local.sampling import CompletionText
from igrpo_nemo.local.vllm_sampler import VllmSampler, why_not_vllm
from igrpo_nemo.run.tokenizer import build_small_tokenizer
from igrpo_nemo.types import Completion, Stage, StopReason, TrainingRow

pytestmark = pytest.mark.skipif(why_not_vllm() is not None, reason=str(why_not_vllm()))

SHARE = 0.2
REQUESTS = [SampleRequest(tuple(range(9 + p, 60 + 7 * p)), 8, f"step1/p{p}") for p in range(4)]
PARAMS = SamplingParams(64, temperature=0.8)


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["user: 12+34=46 <think>4,6</think><answer>46</answer> the end of the line"] * 3
    return build_small_tokenizer(texts, 320)


@pytest.fixture(scope="module")
def sampler(tokenizer):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return VllmSampler(
        Qwen2ForCausalLM(config).eval().cuda(),
        tokenizer,
        max_model_len=256,
        vllm_cfg={"gpu_memory_utilization": SHARE},
        vllm_kwargs={"max_num_seqs": 64},
    )


def _rows(results: list[list[Completion]]) -> list[TrainingRow]:
    return [
        TrainingRow(request.seed_key, Stage.DRAFT, request.prompt_ids, completion, 0.0)
        for request, result in zip(REQUESTS, results, strict=True)
        for completion in result
    ]


@torch.no_grad()
def _differences(sampler: VllmSampler, rows: list[TrainingRow]) -> torch.Tensor:
    """|sampled - learned| of every token's log-prob, in nats."""
    with torch.autocast("cuda", dtype=torch.bfloat16):
        batch = completion_logprobs(sampler.model, rows, temperature=PARAMS.temperature)
    learned = [
        logprobs_T[: len(row.completion.token_ids)].float().cpu()
        for row, logprobs_T in zip(rows, batch.logprobs_RT, strict=True)
    ]
    sampled = [torch.tensor(row.completion.logprobs) for row in rows]
    return (torch.cat(sampled) - torch.cat(learned)).abs()


def test_sampled_log_probs_are_those_that_are_learned(sampler):
    rows = _rows(sampler.sample(REQUESTS, PARAMS))
    assert sum(len(row.completion.token_ids) for row in rows) > 1000
    differences = _differences(sampler, rows)
    print(
        f"\nlog-probs differ by {differences.max():.4f} at most, {differences.mean():.4f} in mean"
    )
    assert differences.max() < 0.05 and differences.mean() < 0.01


def test_a_call_gives_the_same_again(sampler):
    first = sampler.sample(REQUESTS, PARAMS)
    assert sampler.sample(REQUESTS, PARAMS) == first
    assert len({completion.token_ids for completion in first[0]}) == 8
    other = [SampleRequest(REQUESTS[0].prompt_ids, 8, "step2/p0")]
    assert sampler.sample(other, PARAMS)[0] != first[0]


def test_sleep_frees_memory_and_graphs_outlive_it(sampler):
    before = sampler.sample(REQUESTS, PARAMS)
    torch.cuda.empty_cache()
    held, total = torch.cuda.mem_get_info()
    started = time.perf_counter()
    sampler.sleep()
    asleep = time.perf_counter() - started
    freed = torch.cuda.mem_get_info()[0] - held
    started = time.perf_counter()
    after = sampler.sample(REQUESTS, PARAMS)
    print(f"\nsleep freed {freed / 2**30:.1f} GiB in {asleep:.2f} s")
    print(f"wake-up and a call took {time.perf_counter() - started:.2f} s")
    assert freed > 0.8 * SHARE * total
    assert after == before


def test_weights_after_an_update_are_the_new_ones(sampler):
    """Fused Adam leaves no trace on a parameter's version, so nobody may look for one."""
    sampler.sleep()
    before = _rows(sampler.sample(REQUESTS, PARAMS))
    sampler.sleep()
    optimizer = torch.optim.AdamW(sampler.model.parameters(), lr=3e-3, fused=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        batch = completion_logprobs(sampler.model, before, temperature=PARAMS.temperature)
    (-batch.logprobs_RT.float().mean()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert _differences(sampler, before).mean() > 0.05, "the update should be visible"
    differences = _differences(sampler, _rows(sampler.sample(REQUESTS, PARAMS)))
    print(
        f"\nlog-probs differ by {differences.max():.4f} at most, {differences.mean():.4f} in mean"
    )
    assert differences.max() < 0.05 and differences.mean() < 0.01


def test_ends_and_texts_are_the_own_samplers(sampler, tokenizer):
    text_of, params = CompletionText(tokenizer), SamplingParams(32, stop_strings=("=", "<think>"))
    ended = [c for result in sampler.sample(REQUESTS, params) for c in result]
    assert {c.stop_reason for c in ended} >= {StopReason.STOP_STRING}
    for completion in ended:
        ids, reason = completion.token_ids, completion.stop_reason
        assert len(completion.logprobs) == len(ids) <= 32
        assert (ids[-1] == tokenizer.eos_token_id) == (reason is StopReason.EOS)
        assert completion.text == text_of(ids[:-1] if reason is StopReason.EOS else ids)
        stopped = any(stop in completion.text for stop in params.stop_strings)
        assert stopped == (reason is StopReason.STOP_STRING)
        assert (len(ids) == 32) >= (reason is StopReason.LENGTH)
    ends = tuple(range(0, len(tokenizer), 8))
    ended = sampler.sample(REQUESTS, SamplingParams(32, stop_token_ids=ends))
    assert {c.stop_reason for result in ended for c in result} >= {StopReason.EOS}


def test_greedy_truncated_and_abandoned_calls(sampler):
    [greedy] = sampler.sample([SampleRequest((5, 6, 7), 3, "g")], SamplingParams(8, temperature=0))
    assert len({completion.token_ids for completion in greedy}) == 1
    assert all(map(math.isfinite, greedy[0].logprobs))
    [narrow] = sampler.sample([SampleRequest((5, 6, 7), 8, "n")], SamplingParams(8, top_p=0.5))
    assert all(math.isnan(p) for completion in narrow for p in completion.logprobs)
    [long] = sampler.sample([SampleRequest((5,) * 250, 2, "long")], SamplingParams(64))
    assert {len(completion.token_ids) for completion in long} <= set(range(1, 7))
    with pytest.raises(UserError, match="context of 256"):
        sampler.sample([SampleRequest((5,) * 256, 1, "p9")], SamplingParams(8))

    def stop(done, total):
        raise KeyboardInterrupt

    expected = sampler.sample(REQUESTS, PARAMS)
    with pytest.raises(KeyboardInterrupt):
        ends = tuple(range(0, 200, 3))
        sampler.sample(REQUESTS, SamplingParams(64, stop_token_ids=ends), on_progress=stop)
    assert sampler.sample(REQUESTS, PARAMS) == expected

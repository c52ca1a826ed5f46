"""The sampler: exact log-probs, the right distribution, independence of the batch, endings."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter

import pytest
import torch
from tiny_runs import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache

from igrpo_nemo.errors import UserError
from igrpo_nemo.local.packing import completion_logprobs
from igrpo_nemo.local.sampler import Sampler, SampleRequest, SamplingParams
from igrpo_nemo.local.sampling import CompletionText, StopStrings
from igrpo_nemo.local.static_decoder import StaticDecoder
from igrpo_nemo.run.tokenizer import CONTENT_TAGS, check_tags_are_text
from igrpo_nemo.types import Stage, StopReason, TrainingRow


def _requests(vocabulary, shape, seed=0):
    rng = random.Random(seed)
    return [
        SampleRequest(tuple(rng.randrange(vocabulary) for _ in range(length)), count, f"{seed}/{i}")
        for i, (length, count) in enumerate(shape)
    ]


def _ids(results):
    return [[completion.token_ids for completion in result] for result in results]


DECODERS = [
    *(("qwen2", decoder) for decoder in ("fused", "static")),
    *(("llama", decoder) for decoder in ("fused", "static")),
    ("qwen3", "static"),
    *((family, "cached") for family in FAMILIES),
]


@pytest.mark.parametrize(("family", "decoder"), DECODERS)
@pytest.mark.parametrize("truncation", [{}, {"top_p": 0.9, "top_k": 50}])
def test_sampler_logprobs_equal_training_logprobs(
    family, decoder, truncation, make_model, tokenizer
):
    model = make_model(family)
    requests = _requests(len(tokenizer), [(13, 3), (1, 2), (20, 4), (7, 1)])
    params = SamplingParams(
        24, temperature=0.7, stop_token_ids=tuple(range(0, 320, 20)), **truncation
    )
    results = Sampler(model, tokenizer, decoder=decoder).sample(requests, params)
    assert [len(result) for result in results] == [3, 2, 4, 1]
    rows = [
        TrainingRow(request.seed_key, Stage.DRAFT, request.prompt_ids, completion, 0.0)
        for request, result in zip(requests, results, strict=True)
        for completion in result
    ]
    lengths = {len(row.completion.token_ids) for row in rows}
    assert len(lengths) > 2, "rows should end at different steps"
    for packed in (True, False):
        batch = completion_logprobs(model, rows, temperature=0.7, packed=packed)
        for row, logprobs_T in zip(rows, batch.logprobs_RT.tolist(), strict=True):
            for sampled, trained in zip(row.completion.logprobs, logprobs_T, strict=False):
                assert abs(sampled - trained) < 1e-5


@pytest.mark.parametrize("decoder", ["fused", "static", "cached"])
def test_a_row_is_the_same_in_every_batch(decoder, make_model, tokenizer):
    model = make_model("qwen2")
    requests = _requests(len(tokenizer), [(13, 6), (5, 2), (20, 4), (7, 5)])
    params = SamplingParams(30, temperature=1.0, stop_token_ids=tuple(range(0, 320, 20)))
    together = _ids(Sampler(model, tokenizer, decoder=decoder).sample(requests, params))
    sampler = Sampler(model, tokenizer, decoder=decoder)
    assert [_ids(sampler.sample([request], params))[0] for request in requests] == together
    assert _ids(sampler.sample(requests[::-1], params))[::-1] == together
    fewer = [SampleRequest(r.prompt_ids, 2, r.seed_key) for r in requests]
    assert _ids(sampler.sample(fewer, params)) == [rows[:2] for rows in together]


@pytest.mark.parametrize("truncation", [{}, {"temperature": 0.0}, {"top_p": 0.9, "top_k": 50}])
def test_all_decoders_draw_the_same_tokens(truncation, make_model, tokenizer):
    model = make_model("llama")
    # More steps than a block of uniforms has, rows that end at any step, rows of one key.
    requests = [*_requests(len(tokenizer), [(9, 20), (1, 3)]), SampleRequest((5, 6, 7), 4, "a")]
    params = SamplingParams(300, **{"temperature": 1.0, **truncation}, stop_token_ids=(3, 30))
    drawn = {
        decoder: _ids(Sampler(model, tokenizer, decoder=decoder).sample(requests, params))
        for decoder in ("fused", "static", "cached")
    }
    assert drawn["fused"] == drawn["static"] == drawn["cached"]
    if not truncation:
        assert len({ids for rows in drawn["fused"] for ids in rows}) == 27


def test_the_static_decoder_divides_what_does_not_fit(make_model, tokenizer, monkeypatch):
    model = make_model("qwen2")
    requests = _requests(len(tokenizer), [(13, 6), (5, 2), (20, 4), (7, 5)])
    whole = Sampler(model, tokenizer, decoder="static")
    expected = _ids(whole.sample(requests, SamplingParams(20)))
    monkeypatch.setattr(StaticDecoder, "rows_that_fit", lambda self, tokens, params: 5)
    sampler = Sampler(model, tokenizer, decoder="static")
    assert _ids(sampler.sample(requests, SamplingParams(20))) == expected


@pytest.mark.parametrize("decoder", ["fused", "static", "cached"])
def test_long_completions_outgrow_the_first_cache(decoder, make_model, tokenizer):
    model = make_model("qwen2")
    (result,) = Sampler(model, tokenizer, decoder=decoder).sample(
        [SampleRequest((3, 4, 5), 2, "long")], SamplingParams(500, temperature=0.9)
    )
    rows = [TrainingRow("g", Stage.DRAFT, (3, 4, 5), c, 0.0) for c in result]
    assert max(len(c.token_ids) for c in result) > 64
    batch = completion_logprobs(model, rows, temperature=0.9)
    for completion, logprobs_T in zip(result, batch.logprobs_RT.tolist(), strict=True):
        difference = [abs(a - b) for a, b in zip(completion.logprobs, logprobs_T, strict=False)]
        assert max(difference) < 1e-5
        if completion.truncated:
            assert len(completion.token_ids) == 128 - 3, "the context is the limit"


@pytest.mark.parametrize("prompt", [(9, 8, 7), (9,)])
@pytest.mark.parametrize("decoder", ["fused", "static", "cached"])
def test_greedy_is_the_arg_max_at_temperature_one(prompt, decoder, make_model, tokenizer):
    model = make_model("qwen2")
    (result,) = Sampler(model, tokenizer, decoder=decoder).sample(
        [SampleRequest(prompt, 2, "greedy")], SamplingParams(10, temperature=0)
    )
    assert result[0].token_ids == result[1].token_ids
    assert result[0].logprobs == pytest.approx(result[1].logprobs, abs=1e-5)
    ids = list(prompt)
    for token, logprob in zip(result[0].token_ids, result[0].logprobs, strict=True):
        log_V = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert token == log_V.argmax() and abs(logprob - log_V[token].item()) < 1e-5
        ids.append(token)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"top_k": 7}, {"top_p": 0.8}, {"top_p": 0.9, "top_k": 9}],
)
def test_draws_follow_the_softmax(options, make_model, tokenizer):
    """Pearson's chi-square over 4,000 draws of the second token, at the 99.99 % point."""
    model, count = make_model("qwen2", seed=3), 4000
    params = SamplingParams(1, **({"temperature": 1.3} | options))
    prompt = (17, 4, 30)
    (result,) = Sampler(model, tokenizer).sample([SampleRequest(prompt, count, "chi")], params)
    with torch.no_grad():
        logits_V = model(torch.tensor([prompt])).logits[0, -1].double()
    probs_V = (logits_V / params.temperature).softmax(-1)
    ranked = probs_V.argsort(descending=True).tolist()[: params.top_k or len(probs_V)]
    allowed, mass = [], 0.0
    total = sum(probs_V[token].item() for token in ranked)
    for token in ranked:
        if mass >= params.top_p * total:
            break
        allowed.append(token)
        mass += probs_V[token].item()
    counts = Counter(completion.token_ids[0] for completion in result)
    assert set(counts) <= set(allowed)
    cells, rest = [], [0.0, 0]
    for token in allowed:
        expected = probs_V[token].item() / mass * count
        if expected >= 5:
            cells.append((expected, counts[token]))
        else:
            rest = [rest[0] + expected, rest[1] + counts[token]]
    if rest[0] >= 5:
        cells.append((rest[0], rest[1]))
    statistic = sum((seen - expected) ** 2 / expected for expected, seen in cells)
    freedom = len(cells) - 1
    assert freedom >= 4
    # Wilson and Hilferty's approximation of the quantile; 3.72 is the normal's.
    spread = 2 / (9 * freedom)
    assert statistic < freedom * (1 - spread + 3.72 * math.sqrt(spread)) ** 3


@pytest.mark.parametrize("decoder", ["fused", "static", "cached"])
def test_every_end_token_ends_a_completion(decoder, make_model, tokenizer):
    model = make_model("qwen2")
    request = SampleRequest((3, 1, 4), 40, "ends")
    free = Sampler(model, tokenizer, decoder=decoder).sample([request], SamplingParams(20))[0]
    common = Counter(token for c in free for token in c.token_ids[2:]).most_common(3)
    (first, _), (second, _), (third, _) = common
    model.generation_config.eos_token_id = [first, second]
    params = SamplingParams(20, stop_token_ids=(third,))
    for before, after in zip(
        free, Sampler(model, tokenizer, decoder=decoder).sample([request], params)[0], strict=True
    ):
        ends = {first, second, third, tokenizer.eos_token_id}
        cut = next((i + 1 for i, t in enumerate(before.token_ids) if t in ends), None)
        assert after.token_ids == before.token_ids[:cut]
        assert after.stop_reason is (StopReason.LENGTH if cut is None else StopReason.EOS)
        text_ids = after.token_ids if cut is None else after.token_ids[:-1]
        assert after.text == tokenizer.decode(text_ids, skip_special_tokens=True)


@pytest.mark.parametrize("suffix", [0, 1])
def test_stop_strings_may_span_tokens(suffix, make_model, tokenizer):
    model = make_model("qwen2")
    request = SampleRequest((3, 1, 4), 30, "stops")
    sampler = Sampler(model, tokenizer)
    free = sampler.sample([request], SamplingParams(16))[0]
    printable = [c for c in free if c.text[6:12].isascii() and len(c.text) > 14]
    stop = printable[0].text[6:12] + suffix * printable[0].text[12:13]
    stopped = sampler.sample([request], SamplingParams(16, stop_strings=("never", stop)))[0]
    assert any(c.stop_reason is StopReason.STOP_STRING for c in stopped)
    for before, after in zip(free, stopped, strict=True):
        assert before.token_ids[: len(after.token_ids)] == after.token_ids
        assert (stop in after.text) == (after.stop_reason is StopReason.STOP_STRING)
        if after.stop_reason is StopReason.STOP_STRING:
            assert stop not in tokenizer.decode(after.token_ids[:-1], skip_special_tokens=True)


def test_tags_are_text_where_a_tokenizer_counts_them_as_control_tokens(make_model, tokenizer):
    special = copy.deepcopy(tokenizer)
    special.add_special_tokens({"additional_special_tokens": list(CONTENT_TAGS)})
    written = "<think>4</think><answer>6</answer>"
    ids = special(written, add_special_tokens=False).input_ids
    assert len(ids) == 6 and special.decode(ids, skip_special_tokens=True) == "46"
    text_of = CompletionText(special)
    assert text_of([special.eos_token_id, *ids, special.eos_token_id]) == written
    assert CompletionText(tokenizer)([*ids, tokenizer.eos_token_id]) == written
    assert StopStrings(["</answer>"], text_of).reached(ids)
    check_tags_are_text(tokenizer)
    with pytest.raises(UserError, match='</answer> among its control tokens.*"special": false'):
        check_tags_are_text(special)


def test_the_context_limits_prompts_and_completions(make_model, tokenizer):
    sampler = Sampler(make_model("qwen2"), tokenizer, max_model_len=20)
    requests = [SampleRequest((1,) * 15, 3, "long"), SampleRequest((1,) * 4, 3, "short")]
    long, short = sampler.sample(requests, SamplingParams(8))
    assert all(len(c.token_ids) <= 5 for c in long)
    assert any(c.truncated and len(c.token_ids) == 5 for c in long)
    assert any(len(c.token_ids) == 8 for c in short)
    with pytest.raises(UserError, match="step1/p9 has 20 tokens.*context of 20"):
        sampler.sample([SampleRequest((1,) * 20, 1, "step1/p9")], SamplingParams(8))
    with pytest.raises(UserError, match="p0 is empty"):
        sampler.sample([SampleRequest((), 1, "p0")], SamplingParams(8))


@pytest.mark.parametrize("decoder", ["fused", "static", "cached"])
def test_sampling_follows_training_and_leaves_no_trace(decoder, make_model, tokenizer):
    model = make_model("qwen2").train()
    sampler = Sampler(model, tokenizer, decoder=decoder)
    requests = _requests(len(tokenizer), [(6, 3), (9, 2)])
    params = SamplingParams(10, temperature=0.8)
    before = sampler.sample(requests, params)
    assert model.training
    rows = [
        TrainingRow("g", Stage.DRAFT, request.prompt_ids, completion, 0.0)
        for request, result in zip(requests, before, strict=True)
        for completion in result
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    completion_logprobs(model, rows, temperature=0.8).logprobs_RT.mean().backward()
    optimizer.step()
    after = sampler.sample(requests, params)
    assert after != before
    assert _ids(after) == _ids(Sampler(model, tokenizer, decoder=decoder).sample(requests, params))


@pytest.mark.parametrize("decoder", ["static", "cached"])
def test_autocast_samples_in_lower_precision(decoder, make_model, tokenizer):
    model = make_model("qwen2")
    request = SampleRequest((6, 5, 4, 3), 6, "autocast")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (result,) = Sampler(model, tokenizer, decoder=decoder).sample([request], SamplingParams(20))
    rows = [TrainingRow("g", Stage.DRAFT, request.prompt_ids, c, 0.0) for c in result]
    batch = completion_logprobs(model, rows, temperature=1.0)
    differences = [
        abs(sampled - exact)
        for completion, logprobs_T in zip(result, batch.logprobs_RT.tolist(), strict=True)
        for sampled, exact in zip(completion.logprobs, logprobs_T, strict=False)
    ]
    assert 1e-5 < max(differences) < 0.2


_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 320}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mamba", {"state_size": 8}),
        ("rwkv", {"attention_hidden_size": 32}),
        ("minimax", {**_HEADS, "num_local_experts": 2, "num_experts_per_tok": 1}),
    ],
)
def test_recurrent_models_whose_state_rows_cannot_share_are_refused(family, options, tokenizer):
    config = AutoConfig.for_model(family, **_SMALL, **options)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UserError, match=f"model_type {family} cannot be sampled .*nemo_rl") as told:
        Sampler(model, tokenizer)
    assert "\n" not in str(told.value) and not model.training


def test_a_cache_that_is_silently_wrong_is_found(make_model, tokenizer, monkeypatch):
    """Rows that are kept go on with the state of others."""
    monkeypatch.setattr(DynamicCache, "reorder_cache", lambda cache, index: _swapped(cache, index))
    with pytest.raises(UserError, match="its log-probs would be .* nats off"):
        Sampler(make_model("gemma2"), tokenizer)


def _swapped(cache, index):
    return Cache.reorder_cache(cache, index.flip(0))


@pytest.mark.parametrize("decoder", ["fused", "static", "cached"])
def test_damaged_weights_are_named(decoder, make_model, tokenizer):
    model = make_model("qwen2")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="logits are not finite: its weights are damaged"):
        Sampler(model, tokenizer, decoder=decoder).sample(
            [SampleRequest((3, 4), 2, "nan")], SamplingParams(4)
        )


def test_progress_is_reported_and_may_abandon_the_call(make_model, tokenizer):
    sampler = Sampler(make_model("qwen2"), tokenizer)
    requests = _requests(len(tokenizer), [(6, 3), (9, 4)])
    seen = []
    sampler.sample(requests, SamplingParams(10), on_progress=lambda *done: seen.append(done))
    assert seen == sorted(seen) and seen[-1] == (7, 7)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.sample(requests, SamplingParams(10), on_progress=stop)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"stop_strings": ("",)}, "stop string"),
    ],
)
def test_bad_sampling_parameters_are_named(options, name):
    with pytest.raises(UserError, match=name):
        SamplingParams(**({"max_new_tokens": 4} | options))

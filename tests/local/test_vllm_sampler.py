"""vLLM as the embedded engine's sampler: what it is asked for, what is made of its answers.

A stand-in engine answers on a CPU: it forwards a model of the policy's config that has nothing but
the weights it was handed. Where vLLM is installed its source must have what is called; `tests/gpu`
runs it.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import math
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from igrpo_nemo.errors import NonFiniteError, UserError
from igrpo_nemo.local import vllm_sampler
from igrpo_nemo.local.sampler import Sampler, SampleRequest, SamplingParams
from igrpo_nemo.local.vllm_sampler import VllmSampler, checkpoint_weights, save_without_weights
from igrpo_nemo.run.tokenizer import CONTENT_TAGS
from igrpo_nemo.types import StopReason

REQUESTS = [SampleRequest((5, 9, 200, 31), 3, "step1/p0"), SampleRequest((7, 8), 2, "step1/p1")]


class Engine:
    """vLLM's `LLM` and its `llm_engine` in one, as far as the sampler calls them."""

    def __init__(self, model: str, **options) -> None:
        self.options, self.called, self.asked = options, [], []
        config = AutoConfig.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_config(config).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model.load_weights = self._load
        self.llm_engine, self.running = self, {}

    def _load(self, weights):
        state = {name: tensor.clone() for name, tensor in weights}
        self.model.load_state_dict(state, strict=False)
        return set(state)

    def apply_model(self, function):
        self.called.append("weights")
        return [function(self.model)]

    def reset_prefix_cache(self):
        self.called.append("reset")
        return not self.running

    def sleep(self, level):
        self.called.append(f"sleep {level}")
        for parameter in self.model.parameters():
            parameter.data.fill_(math.nan)

    def wake_up(self):
        self.called.append("wake up")

    def add_request(self, name, prompt, params):
        assert prompt["type"] == "token" and "sleep 2" != self.called[-1]
        generator = torch.Generator().manual_seed(params.seed) if params.temperature else None
        self.asked.append(params)
        self.running[name] = (prompt["prompt_token_ids"], params, generator, [], [])

    def has_unfinished_requests(self):
        return bool(self.running)

    def abort_request(self, names):
        self.called.append("abort")
        for name in names:
            self.running.pop(name, None)

    def step(self):
        assert not torch.is_autocast_enabled("cpu")
        answers = [self._advance(name, *parts) for name, parts in list(self.running.items())]
        return [answer for answer in answers if answer is not None]

    def _advance(self, name, prompt, params, generator, tokens, logprobs):
        logits = self.model(torch.tensor([prompt + tokens])).logits[0, -1].detach()
        logprobs_V = (logits / (params.temperature or 1.0)).log_softmax(-1)
        token = (
            logprobs_V.argmax()
            if generator is None
            else torch.multinomial(logprobs_V.exp().nan_to_num(1.0), 1, generator=generator)
        ).item()
        tokens.append(token)
        logprobs.append(logprobs_V[token].item())
        text = self.tokenizer.decode(tokens, skip_special_tokens=params.skip_special_tokens)
        if token in params.stop_token_ids or any(stop in text for stop in params.stop):
            reason = "stop"
        elif len(tokens) == params.max_tokens:
            reason = "length"
        else:
            return None
        del self.running[name]
        output = SimpleNamespace(
            token_ids=tokens, logprobs=SimpleNamespace(logprobs=logprobs), finish_reason=reason
        )
        return SimpleNamespace(request_id=name, finished=True, outputs=[output])


@pytest.fixture
def vllm(monkeypatch):
    """The stand-in for the package; `opened` has the engines."""
    package, params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    package.opened = []
    package.LLM = lambda **options: package.opened.append(Engine(**options)) or package.opened[-1]
    params.SamplingParams = SimpleNamespace
    params.RequestOutputKind = SimpleNamespace(FINAL_ONLY="final")
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "1")
    return package


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("stop_strings", [(), ("5",)])
def test_greedy_completions_are_those_of_the_own_sampler(
    family, stop_strings, vllm, make_model, tokenizer
):
    model = make_model(family)
    params = SamplingParams(
        16, temperature=0, stop_strings=stop_strings, stop_token_ids=tuple(range(0, 320, 16))
    )
    own = Sampler(model, tokenizer).sample(REQUESTS, params)
    sampler = VllmSampler(model, tokenizer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = sampler.sample(REQUESTS, params)
    for ours, them in zip(sum(own, []), sum(theirs, []), strict=True):
        assert (ours.token_ids, ours.text, ours.stop_reason) == (
            them.token_ids,
            them.text,
            them.stop_reason,
        )
        assert them.logprobs == pytest.approx(ours.logprobs, abs=1e-5)
    [engine] = vllm.opened
    assert {params.detokenize for params in engine.asked} == {bool(stop_strings)}


def test_all_three_ends_follow_the_same_conventions(vllm, make_model, tokenizer):
    model = make_model("qwen2")
    sampler = VllmSampler(model, tokenizer)
    [free] = sampler.sample([SampleRequest((5, 9), 8, "free")], SamplingParams(12))
    stop = next(c.text[3] for c in free if len(c.text) > 6 and c.text[3].isascii())
    params = SamplingParams(12, stop_strings=(stop,), stop_token_ids=(free[-1].token_ids[4],))
    [ended] = sampler.sample([SampleRequest((5, 9), 8, "free")], params)
    assert {c.stop_reason for c in ended} >= {StopReason.STOP_STRING, StopReason.EOS}
    for completion in ended:
        at_end = completion.token_ids[-1] in (params.stop_token_ids[0], tokenizer.eos_token_id)
        assert at_end == (completion.stop_reason is StopReason.EOS)
        shown = completion.token_ids[:-1] if at_end else completion.token_ids
        assert completion.text == tokenizer.decode(shown, skip_special_tokens=True)
        assert len(completion.logprobs) == len(completion.token_ids)
        if completion.stop_reason is StopReason.STOP_STRING:
            assert stop in completion.text


def test_seeds_follow_from_the_rows_names_alone(vllm, make_model, tokenizer):
    sampler = VllmSampler(make_model("qwen2"), tokenizer)
    params = SamplingParams(8, temperature=0.8, stop_strings=("zz",))
    first = sampler.sample(REQUESTS, params)
    assert sampler.sample(REQUESTS, params) == first
    assert sampler.sample(REQUESTS[1:], params) == first[1:]
    [engine] = vllm.opened
    seeds = [asked.seed for asked in engine.asked]
    assert len(set(seeds[:5])) == 5 and seeds[:5] == seeds[5:10] and seeds[10:] == seeds[3:5]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({c.token_ids for c in first[0]}) > 1


def test_every_call_samples_from_the_policy_as_it_is(vllm, make_model, tokenizer):
    """Also after an optimizer that leaves no trace on the parameters, as fused ones do."""
    model = make_model("qwen2")
    sampler = VllmSampler(model, tokenizer)
    [engine] = vllm.opened
    assert engine.called == ["sleep 2"]
    before = sampler.sample(REQUESTS, SamplingParams(8))
    sampler.sample(REQUESTS, SamplingParams(8))
    assert engine.called[1:] == ["wake up", "weights", "reset", "weights", "reset"]
    sampler.sleep()
    sampler.sleep()
    assert engine.called[6:] == ["sleep 2"]
    model.model.embed_tokens.weight.data.neg_()
    after = sampler.sample(REQUESTS, SamplingParams(8, temperature=0))
    assert engine.called[7:] == ["wake up", "weights", "reset"]
    assert after != before
    greedy = Sampler(model, tokenizer).sample(REQUESTS, SamplingParams(8, temperature=0))
    assert [c.token_ids for row in after for c in row] == [
        c.token_ids for row in greedy for c in row
    ]


@pytest.mark.parametrize(
    "options",
    [{"top_p": 0.9}, {"top_k": 20}, {"top_k": 20, "top_p": 0.5}, {"top_k": 320}, {"top_p": 1.0}],
)
def test_logprobs_of_a_truncated_softmax_are_not_passed_off(options, vllm, make_model, tokenizer):
    sampler = VllmSampler(make_model("qwen2"), tokenizer)
    results = sampler.sample(REQUESTS, SamplingParams(4, **options))
    known = {math.isfinite(p) for row in results for c in row for p in c.logprobs}
    assert known == {options.get("top_p", 1) == 1 and options.get("top_k", 320) == 320}


def test_what_the_engine_is_opened_with(vllm, make_model, tokenizer):
    cfg = {"gpu_memory_utilization": 0.3, "enforce_eager": True, "max_model_len": 64}
    for options in (
        {},
        {"vllm_cfg": cfg, "vllm_kwargs": {"async_scheduling": True, "dtype": "float32"}},
    ):
        VllmSampler(make_model("qwen2"), tokenizer, max_model_len=100, **options)
    plain, chosen = (engine.options for engine in vllm.opened)
    assert plain == {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "max_model_len": 100,
        "gpu_memory_utilization": vllm_sampler.GPU_SHARE,
        "enforce_eager": False,
        "enable_sleep_mode": True,
        "logprobs_mode": "processed_logprobs",
        "async_scheduling": False,
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        "use_tqdm_on_load": False,
    }
    assert chosen == {**plain, **cfg, "async_scheduling": True, "dtype": "float32"}
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert os.environ["VLLM_LOGGING_LEVEL"] == "1", "what the user has set stays"


def test_bad_input_is_refused_in_one_line(vllm, make_model, tokenizer):
    model = make_model("qwen2")
    sampler = VllmSampler(model, tokenizer, max_model_len=20)
    with pytest.raises(UserError, match="step1/p9 has 20 tokens.*context of 20"):
        sampler.sample([SampleRequest((1,) * 20, 1, "step1/p9")], SamplingParams(8))
    with pytest.raises(UserError, match="p0 is empty"):
        sampler.sample([SampleRequest((), 1, "p0")], SamplingParams(8))
    [long] = sampler.sample([SampleRequest((1,) * 15, 3, "long")], SamplingParams(8))
    assert max(len(c.token_ids) for c in long) == 5
    assert sampler.sample([], SamplingParams(8)) == []
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        sampler.sample(REQUESTS, SamplingParams(4))
    assert not vllm.opened[0].running


def test_what_vllm_refuses_is_told_with_the_key(vllm, make_model, tokenizer):
    def no_room(**options):
        raise ValueError("Free memory on device\n(3/80 GiB) is less than desired")

    vllm.LLM = no_room
    with pytest.raises(UserError, match=r"Free memory on.*gpu_memory_utilization=0\.5") as told:
        VllmSampler(make_model("qwen2"), tokenizer)
    assert "\n" not in str(told.value)


def test_weights_that_are_not_handed_over_are_found(vllm, make_model, tokenizer):
    sampler = VllmSampler(make_model("llama"), tokenizer)
    vllm.opened[0].model.register_parameter("absorbed", torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(UserError, match=r"llama: vLLM has weights.*\(absorbed\)"):
        sampler.sample(REQUESTS, SamplingParams(4))


def test_progress_is_reported_and_may_abandon_the_call(vllm, make_model, tokenizer):
    sampler, seen = VllmSampler(make_model("qwen2"), tokenizer), []
    params = SamplingParams(10, stop_token_ids=tuple(range(0, 320, 9)))
    whole = sampler.sample(REQUESTS, params, on_progress=lambda *done: seen.append(done))
    assert seen == sorted(seen) and seen[-1] == (5, 5) and len(seen) > 1

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.sample(REQUESTS, params, on_progress=stop)
    assert vllm.opened[0].called[-1] == "abort" and not vllm.opened[0].running
    assert sampler.sample(REQUESTS, params) == whole


def test_tags_stay_in_the_text_where_they_are_control_tokens(vllm, make_model, tokenizer):
    special = copy.deepcopy(tokenizer)
    special.add_special_tokens({"additional_special_tokens": list(CONTENT_TAGS)})
    sampler = VllmSampler(make_model("qwen2"), special)
    tag = special.convert_tokens_to_ids("</answer>")
    params = SamplingParams(3, stop_token_ids=(tag,), stop_strings=("never",))
    sampler.sample(REQUESTS[:1], params)
    assert not any(asked.skip_special_tokens for asked in vllm.opened[0].asked)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2", "nemotron_h"])
def test_weights_are_handed_over_as_a_saved_folder_has_them(family, make_model, tmp_path):
    model = make_model(family)
    model.save_pretrained(tmp_path)
    saved, weights = load_file(tmp_path / "model.safetensors"), checkpoint_weights(model)
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in saved)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    own = {parameter.data_ptr() for parameter in again.parameters()}
    assert {tensor.data_ptr() for tensor in checkpoint_weights(again).values()} <= own | {
        buffer.data_ptr() for buffer in again.buffers()
    }


def test_the_folder_that_vllm_reads_has_all_but_weights(make_model, tokenizer, tmp_path):
    model = make_model("qwen2")
    save_without_weights(model, tokenizer, str(tmp_path))
    assert model.config.architectures is None, "the policy's own config stays as it is"
    assert AutoConfig.from_pretrained(tmp_path).architectures == ["Qwen2ForCausalLM"]
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert not list(tmp_path.glob("*.safetensors"))


# What vLLM itself does.

SPEC = importlib.util.find_spec("vllm")
needs_source = pytest.mark.skipif(SPEC is None, reason="vLLM is not installed: its source is read")


def _class(path: str, name: str) -> ast.ClassDef:
    assert SPEC is not None and SPEC.origin is not None
    tree = ast.parse((Path(SPEC.origin).parent / path).read_text())
    return next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)


def _parameters(cls: ast.ClassDef, method: str) -> list[str]:
    [function] = [n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == method]
    return [a.arg for a in (*function.args.posonlyargs, *function.args.args)][1:] + [
        a.arg for a in function.args.kwonlyargs
    ]


def _fields(cls: ast.ClassDef) -> set[str]:
    return {n.target.id for n in cls.body if isinstance(n, ast.AnnAssign)}  # type: ignore[union-attr]


@needs_source
def test_vllm_has_what_is_called(vllm, make_model, tokenizer):
    sampler = VllmSampler(make_model("qwen2"), tokenizer)
    sampler.sample(REQUESTS[:1], SamplingParams(2))
    llm, engine = (
        _class("entrypoints/llm.py", "LLM"),
        _class("v1/engine/llm_engine.py", "LLMEngine"),
    )
    accepted = {
        *_parameters(llm, "__init__"),
        *_fields(_class("engine/arg_utils.py", "EngineArgs")),
    }
    assert accepted >= {"model", *vllm.opened[0].options}
    params = _class("sampling_params.py", "SamplingParams")
    assert _fields(params) >= vars(vllm.opened[0].asked[0]).keys()
    assert _parameters(llm, "sleep")[0] == "level" and _parameters(llm, "wake_up") == ["tags"]
    assert len(_parameters(llm, "apply_model")) == 1
    assert _parameters(llm, "reset_prefix_cache") == ["reset_running_requests", "reset_connector"]
    assert _parameters(engine, "add_request")[:3] == ["request_id", "prompt", "params"]
    assert _parameters(engine, "abort_request")[0] == "request_ids"
    assert not _parameters(engine, "step") and not _parameters(engine, "has_unfinished_requests")
    assert _fields(_class("inputs/engine.py", "TokensInput")) >= {"type", "prompt_token_ids"}
    assert _fields(_class("logprobs.py", "FlatLogprobs")) >= {"logprobs"}
    assert "FINAL_ONLY" in ast.unparse(_class("sampling_params.py", "RequestOutputKind"))

"""The small server on loopback: replies follow the request and nothing else."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import tiny_policy

from igrpo_nemo.evaluation.skills.program import server_answers
from igrpo_nemo.evaluation.skills.serve import Batcher, serving
from igrpo_nemo.local.model import open_policy
from igrpo_nemo.prompts import PromptBuilder, PromptProfile, TokenBudget
from igrpo_nemo.types import Problem

CONTEXT = 256
MESSAGES = [
    {"role": "system", "content": "<think>...</think><answer>...</answer>"},
    {"role": "user", "content": "7+5*3="},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_policy(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with serving(folder) as address:
        yield address


def post(address: str, **body: Any) -> dict[str, Any]:
    data = json.dumps({"messages": MESSAGES, "max_tokens": 20, "seed": 1, **body}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/chat/completions", data, headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def text(reply: dict[str, Any]) -> str:
    return reply["choices"][0]["message"]["content"]


def test_a_reply_follows_its_seed(address: str) -> None:
    first = post(address, seed=1)
    assert text(post(address, seed=1)) == text(first)
    assert len({text(post(address, seed=seed)) for seed in range(6)}) == 6


def test_temperature_and_top_p_count(address: str) -> None:
    greedy = text(post(address, temperature=0))
    assert text(post(address, temperature=0, seed=2)) == greedy
    assert text(post(address, top_p=1e-6, seed=3)) == greedy
    assert text(post(address, top_k=1, seed=4)) == greedy
    assert text(post(address, temperature=1.0, seed=2)) != greedy


def test_a_reply_does_not_depend_on_what_else_is_asked(address: str) -> None:
    alone = [text(post(address, seed=seed)) for seed in range(12)]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda seed: text(post(address, seed=seed)), range(12)))
    assert together == alone


def test_tokens_of_a_reply(address: str) -> None:
    reply = post(address, max_tokens=5)
    assert reply["usage"]["completion_tokens"] == 5
    assert reply["choices"][0]["finish_reason"] == "length"
    prompt = reply["usage"]["prompt_tokens"]
    whole = post(address, max_tokens=None)["usage"]
    assert whole["prompt_tokens"] == prompt and whole["total_tokens"] <= CONTEXT
    long = {"messages": [{"role": "user", "content": "7+" * 100}], "max_tokens": None}
    replies = (post(address, **long, seed=seed)["usage"] for seed in range(8))
    assert any(usage["total_tokens"] == CONTEXT for usage in replies)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"max_tokens": CONTEXT}, f"maximum context length is {CONTEXT} tokens"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 2}, "top_p is 2"),
        ({"messages": "text"}, "cannot render"),
        ({"messages": [{"role": "user", "content": "7+" * 200}], "max_tokens": None}, "no room"),
        ({"stream": True}, "stream and n are not supported"),
        ({"n": 3}, "stream and n are not supported"),
    ],
)
def test_requests_that_cannot_be_answered(address: str, body: dict, message: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(address, **body)
    assert caught.value.code == 400
    assert message in json.load(caught.value)["error"]["message"]
    assert text(post(address))


def test_the_model_and_its_context(address: str, folder: Path) -> None:
    with urllib.request.urlopen(f"{address}/models", timeout=60) as reply:
        (model,) = json.load(reply)["data"]
    assert model["id"] == str(folder) and model["max_model_len"] == CONTEXT
    assert server_answers(address) and not server_answers("http://127.0.0.1:9/v1")


def test_the_prompt_is_the_trainings(folder: Path) -> None:
    policy = open_policy(folder, precision="float32")
    profile = PromptProfile(MESSAGES[0]["content"], "\n", "draft")
    builder = PromptBuilder(policy.tokenizer, profile, TokenBudget(CONTEXT, 20))
    question = builder.question(Problem(id="p", question=MESSAGES[1]["content"], answer="2"))
    engine = Batcher(policy)
    assert engine.prompt_ids(MESSAGES, {}) == question.token_ids
    policy.tokenizer.chat_template = "{{ messages[-1]['content'] }}{{ mark }}"
    with_mark = policy.tokenizer("7+5*3=</think>", add_special_tokens=False).input_ids
    assert engine.prompt_ids(MESSAGES, {"mark": "</think>"}) == tuple(with_mark)
    engine.close()

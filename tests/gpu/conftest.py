"""Devices, and a small policy whose head size the kernels of a GPU take."""

from __future__ import annotations

import random

import pytest
import tiny_runs
import torch

from igrpo_nemo.local.model import save_pretrained_folder
from igrpo_nemo.local.warmup import build_small_model
from igrpo_nemo.run.tokenizer import build_small_tokenizer
from igrpo_nemo.types import Completion, Stage, StopReason, TrainingRow

SHAPE = tiny_runs.SHAPE.model_copy(
    update={
        "hidden_size": 64,
        "num_heads": 2,
        "num_kv_heads": 1,
        "intermediate_size": 96,
        "initializer_range": 0.08,
    }
)


@pytest.fixture(params=["cpu", "cuda"])
def device(request, monkeypatch) -> str:
    """The device that the engine finds: that the tests run on a CPU too shows that they work."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    if request.param == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return request.param


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory):
    """Logits of at most about 3, which bf16 rounds to a hundredth."""
    folder = tmp_path_factory.mktemp("gpu_policy")
    tokenizer = build_small_tokenizer(["<think>12+34=46</think><answer>46</answer>"] * 3, 320)
    save_pretrained_folder(
        build_small_model(SHAPE, tokenizer, context=256, seed=1), tokenizer, folder
    )
    return folder


@pytest.fixture(scope="session")
def rows() -> list[TrainingRow]:
    """Contexts of several rows and of one, of many tokens and of one; two contexts a group."""
    rng, result = random.Random(0), []
    for group, (context_length, lengths) in enumerate(
        [(40, [30, 1, 70]), (1, [3, 9]), (90, [60]), (17, [1, 1]), (64, [16, 33, 64, 65])]
    ):
        context = tuple(rng.choices(range(256), k=context_length))
        for length in lengths:
            ids = tuple(rng.choices(range(256), k=length))
            completion = Completion("", ids, (0.0,) * length, StopReason.LENGTH)
            reward = float(rng.randrange(3))
            result.append(TrainingRow(str(group // 2), Stage.REFINE, context, completion, reward))
    return result

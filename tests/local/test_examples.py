"""The examples run, and what they show is what the engine does."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch

from igrpo_nemo.config import load_config
from igrpo_nemo.local.learner import Learner
from igrpo_nemo.local.warmup import build_small_model
from igrpo_nemo.objectives.surrogate import SurrogateConfig
from igrpo_nemo.run.tokenizer import build_small_tokenizer
from igrpo_nemo.types import Completion, Stage, StopReason, TrainingRow

FOLDER = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def minimal():
    spec = importlib.util.spec_from_file_location("minimal_igrpo", FOLDER / "minimal_igrpo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_update_is_the_engines(minimal):
    tokenizer = build_small_tokenizer(["some text"], 262)
    shape = tiny_runs.SHAPE.model_copy(update={"initializer_range": 0.2})
    start = build_small_model(shape, tokenizer, context=64, seed=1)
    rows = [
        TrainingRow(str(n // 4), Stage.REFINE, (3 + n // 4, 5, 7), completion, float(n % 3))
        for n in range(8)
        for completion in [Completion("", tuple(range(9, 10 + n)), (), StopReason.EOS)]
    ]
    here, there = copy.deepcopy(start), copy.deepcopy(start)
    minimal.update(here, torch.optim.SGD(here.parameters(), lr=0.1), rows, SurrogateConfig())
    optimizer = torch.optim.SGD(there.parameters(), lr=0.1)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    config = load_config(["experiment=demo", "policy.max_grad_norm=1.0"])
    Learner(there, optimizer, constant, config).update(rows)
    moved = 0.0
    for a, b, c in zip(here.parameters(), there.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
        moved += float((a - c).detach().abs().sum())
    assert moved > 0.1


def test_it_runs(minimal, monkeypatch, capsys):
    few = ["--steps", "1", "--problems", "2", "--warmup-steps", "2"]
    monkeypatch.setattr(sys, "argv", ["minimal_igrpo.py", *few])
    minimal.main()
    assert capsys.readouterr().out.startswith("step   1: drafts")


def test_it_is_short_enough_to_read():
    assert len((FOLDER / "minimal_igrpo.py").read_text().splitlines()) <= 150

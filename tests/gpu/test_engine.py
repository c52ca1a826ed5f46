"""The embedded engine on a GPU: it computes what it computes on a CPU.

Each test runs on both, and is skipped on the one that is not there.
"""

from __future__ import annotations

import copy
import json
import math
from contextlib import nullcontext

import pytest
import tiny_runs
import torch

from igrpo_nemo.cli import main
from igrpo_nemo.config import load_config
from igrpo_nemo.local.learner import Learner
from igrpo_nemo.local.model import load_model
from igrpo_nemo.local.packing import can_pack, completion_logprobs
from igrpo_nemo.local.sampler import Sampler, SampleRequest, SamplingParams
from igrpo_nemo.run.tokenizer import load_tokenizer
from igrpo_nemo.types import Stage, TrainingRow

PRECISIONS = [("float32", 1e-4), ("bfloat16", 5e-2)]


def running(device, precision):
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device, dtype=torch.bfloat16)


@pytest.mark.parametrize(("precision", "tolerance"), PRECISIONS)
def test_sampled_logprobs_are_the_learners(device, precision, tolerance, policy_folder):
    model = load_model(policy_folder, device=device)
    sampler = Sampler(model, load_tokenizer(policy_folder), max_model_len=256)
    shape = [(13, 3), (1, 2), (70, 8), (7, 1)]
    requests = [
        SampleRequest(tuple((7 * i + length) % 256 for i in range(length)), count, str(length))
        for length, count in shape
    ]
    params = SamplingParams(100, temperature=0.7, stop_token_ids=tuple(range(0, 256, 25)))
    with running(device, precision):
        results = sampler.sample(requests, params)
    rows = [
        TrainingRow(request.seed_key, Stage.DRAFT, request.prompt_ids, completion, 0.0)
        for request, result in zip(requests, results, strict=True)
        for completion in result
    ]
    assert [len(result) for result in results] == [count for _, count in shape]
    assert len({len(row.completion.token_ids) for row in rows}) > 4, "rows end at different steps"
    for packed in (True, False):
        with running(device, precision), torch.no_grad():
            batch = completion_logprobs(model, rows, temperature=0.7, packed=packed)
        for row, logprobs_T in zip(rows, batch.logprobs_RT.float().cpu(), strict=True):
            sampled = torch.tensor(row.completion.logprobs)
            assert (sampled - logprobs_T[: len(sampled)]).abs().max() < tolerance


def test_a_row_does_not_depend_on_its_batch(device, policy_folder):
    sampler = Sampler(load_model(policy_folder, device=device), load_tokenizer(policy_folder))
    requests = [SampleRequest(tuple(range(n, 2 * n)), 4, str(n)) for n in (3, 30, 60)]
    params = SamplingParams(40, stop_token_ids=tuple(range(0, 256, 50)))
    together = sampler.sample(requests, params)
    alone = [sampler.sample([request], params)[0] for request in requests]
    for first, second in zip(together, alone, strict=True):
        assert [c.token_ids for c in first] == [c.token_ids for c in second]


@pytest.mark.parametrize(("precision", "tolerance"), PRECISIONS)
def test_packed_rows_are_padded_ones(device, precision, tolerance, policy_folder, rows):
    model = load_model(policy_folder, device=device)
    assert can_pack(model)
    logprobs, gradients = [], []
    for packed in (True, False):
        model.zero_grad()
        with running(device, precision):
            batch = completion_logprobs(model, rows, temperature=0.7, packed=packed)
        weights_RT = torch.linspace(-1, 1, batch.logprobs_RT.numel(), device=device)
        (batch.logprobs_RT * weights_RT.view_as(batch.logprobs_RT)).mean().backward()
        logprobs.append(batch.logprobs_RT.detach().float())
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert (logprobs[0] - logprobs[1]).abs().max() < tolerance
    for name, gradient in gradients[1].items():
        largest = max(gradient.abs().max().item(), 1e-3)
        assert (gradients[0][name] - gradient).abs().max() < tolerance * largest, name


def test_one_update_is_the_cpus(device, policy_folder, rows):
    """In float32, packed, against padded rows on a CPU."""
    config = load_config(["experiment=demo", "policy.max_grad_norm=null"])

    def updated(on, packed):
        model = load_model(policy_folder, device=on)
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        packing = config.replaced("policy.sequence_packing", enabled=packed)
        metrics = Learner(model, optimizer, schedule, packing).update(rows)
        after = model.state_dict()
        return {name: (after[name] - before[name]).cpu() for name in after}, metrics

    (ours, metrics), (theirs, expected) = updated(device, True), updated("cpu", False)
    assert max(change.abs().max() for change in theirs.values()) > 1e-3
    for name, change in theirs.items():
        assert (ours[name] - change).abs().max() < 1e-5, name
    for name in ("loss", "grad_norm", "entropy/sampled"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(device, policy_folder, tmp_path):
    """To the last bit on a CPU. On a GPU sums may be taken in another order: the same tokens, and
    weights that differ by a small part of a step (1e-3)."""

    class Killed(BaseException):
        pass

    def killed(update):
        if update == 3:
            raise Killed

    whole = tiny_runs.run(tiny_runs.tiny_config(policy_folder, tmp_path / "whole"))
    config = tiny_runs.tiny_config(policy_folder, tmp_path / "killed")
    with pytest.raises(Killed):
        tiny_runs.run(config, before_update=killed)
    rest = tiny_runs.run(config)
    assert len(rest.rollouts) == len(whole.rollouts) - 2 > 0
    same = tiny_runs.same_weights(rest.final, whole.final)
    print(f"{device}: resumed {'to the last bit' if same else 'not to the last bit'}")
    assert same or device == "cuda"
    for ours, uninterrupted in zip(rest.rollouts, whole.rollouts[2:], strict=True):
        assert tiny_runs.texts(ours) == tiny_runs.texts(uninterrupted)
    for name, weight in whole.final.items():
        # The gradient of a key's bias is zero but for rounding, which Adam makes a step of.
        if not name.endswith("k_proj.bias"):
            assert (rest.final[name] - weight).abs().max() < 1e-4, name


@pytest.mark.slow
def test_the_demo_trains(device, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("IGRPO_CACHE_DIR", str(tmp_path / "cache"))
    run = tmp_path / "run"
    words = [
        "experiment=demo",
        *("igrpo.warmup.steps=5", "igrpo.warmup.batch_size=8", "grpo.max_num_steps=2"),
        *("grpo.num_prompts_per_step=2", "grpo.max_val_samples=4", f"logger.log_dir={run}"),
    ]
    assert main(["train", *words]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["metrics"]["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert json.loads((run / "summary.json").read_text())["steps"] == 2

"""A policy learned otherwise than sampled is not trained; one that has diverged is not saved."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file
from tiny_runs import FAMILIES

from igrpo_nemo.cli.entry import main
from igrpo_nemo.errors import NonFiniteError, UserError
from igrpo_nemo.local import packing, parts
from igrpo_nemo.local.learner import Learner
from igrpo_nemo.local.probe import PolicyProbe
from igrpo_nemo.local.sampler import Sampler
from igrpo_nemo.objectives.entropy import token_logprobs

DIVERGES = "policy.optimizer.kwargs.lr=1.0e18"


@pytest.fixture
def probe_of(make_model, tokenizer):
    def make(family: str, **options) -> PolicyProbe:
        sampler = Sampler(make_model(family), tokenizer)
        return PolicyProbe(sampler, tuple(range(5, 25)), temperature=0.8, packed=True)

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_learned_as_it_is_sampled(family, probe_of):
    probe_of(family).check_agreement()
    probe_of(family).check_finite()


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "granite"])
def test_a_transform_behind_the_head_that_the_learner_leaves_out_is_named(
    family, probe_of, monkeypatch
):
    def scaled(logits_AV, target_A, *, temperature):
        return token_logprobs(logits_AV * 1.01, target_A, temperature=temperature)

    monkeypatch.setattr(packing, "token_logprobs", scaled)
    with pytest.raises(UserError, match=f"model_type {family}: .*differ by .* nats.*nemo_rl"):
        probe_of(family).check_agreement()


def test_a_run_stops_before_its_first_step_where_the_two_differ(policy, tmp_path, monkeypatch):
    def capped(logits_AV, target_A, *, temperature):
        return token_logprobs(torch.tanh(logits_AV), target_A, temperature=temperature)

    monkeypatch.setattr(packing, "token_logprobs", capped)
    with pytest.raises(UserError, match="log-probs of one prompt differ"):
        tiny_runs.run(tiny_runs.tiny_config(policy, tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("save_period", [1, 100])
def test_a_policy_that_diverges_is_never_saved(save_period, policy, tmp_path, capsys):
    """The first update leaves finite weights that lead to no finite logit."""
    run = tmp_path / "run"
    words = [f"policy.model_name={policy}", f"logger.log_dir={run}", "checkpointing.keep_top_k=1"]
    period = f"checkpointing.save_period={save_period}"
    with mock.patch.object(parts, "scorer_of", lambda config: tiny_runs.TextScorer()):
        code = main(["train", *tiny_runs.TASK, *words, period, DIVERGES])
    [line] = capsys.readouterr().err.splitlines()
    assert code == NonFiniteError.exit_code == 76
    assert line.startswith(f"error: step {1 if save_period == 1 else 2}: the ")
    assert "not finite" in line and line.endswith("; no checkpoint was saved before it")
    assert not list(run.rglob("step_*"))


@pytest.mark.parametrize("metric", ["null", "train:loss"])
def test_the_last_good_checkpoint_is_kept_and_named(metric, policy, tmp_path):
    run = tmp_path / "run"
    keep = ("checkpointing.keep_top_k=1", f"checkpointing.metric_name={metric}")
    update, count = Learner.update, itertools.count(1)

    def diverges(learner, rows):
        if next(count) == 3:
            for group in learner.optimizer.param_groups:
                group["lr"] = 1e18
        return update(learner, rows)

    with (
        mock.patch.object(Learner, "update", diverges),
        pytest.raises(NonFiniteError) as caught,
    ):
        tiny_runs.run(tiny_runs.tiny_config(policy, run, *keep))
    good = run / "checkpoints" / "step_00000002"
    assert str(caught.value).startswith("step 3: ")
    assert f"the last good checkpoint is {good}: begin a new run" in str(caught.value)
    assert all(v.isfinite().all() for v in load_file(good / "model/model.safetensors").values())
    assert not (run / "checkpoints" / "step_00000003").exists()


def test_a_checkpoint_that_holds_a_diverged_policy_is_named_at_the_resume(policy, tmp_path):
    """As an earlier version may have saved it."""
    run = tmp_path / "run"
    config = tiny_runs.tiny_config(policy, run, DIVERGES)
    with (
        mock.patch.object(PolicyProbe, "check_finite", lambda probe: None),
        pytest.raises(NonFiniteError),
    ):
        tiny_runs.run(config)
    with pytest.raises(NonFiniteError, match="step_00000001: .*not finite.*remove it"):
        tiny_runs.run(config)

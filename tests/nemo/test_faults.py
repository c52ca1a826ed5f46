"""What goes wrong in the middle of the real `grpo_train`: the step completes with whole groups, or
fails with one clear error."""

from __future__ import annotations

import os
import signal

import nemo_runs
import psutil
import pytest
import ray
from nemo_runs import ENGINES, SYNC

from igrpo_nemo.nemo import launch
from igrpo_nemo.nemo.cpu import generation
from igrpo_nemo.nemo.environment import EnvironmentClient
from igrpo_nemo.nemo.failure import LostProcessError, RolloutError

SHORT = ["grpo.max_num_steps=3", "grpo.num_prompts_per_step=4"]


def _process(environment):
    pid = ray.get(environment.__ray_call__.remote(lambda worker: os.getpid()))
    return psutil.Process(pid)


def _kill(environment):
    """From outside, as an out-of-memory killer would."""
    os.kill(_process(environment).pid, signal.SIGKILL)


def _restart(environment):
    ray.kill(environment, no_restart=False)


def _end(environment):
    """For good; returns when the process is gone, which Ray alone does not wait for."""
    process = _process(environment)
    ray.kill(environment)
    process.wait(60)


def _at_calls(monkeypatch, acts):
    """Calls `acts[n](environment)` right before its n-th call, beside those in flight."""
    calls = []

    def counted(original):
        def call(client, *args, **kwargs):
            calls.append(args)
            if act := acts.get(len(calls)):
                act(client._actor)
            return original(client, *args, **kwargs)

        return call

    monkeypatch.setattr(EnvironmentClient, "step", counted(EnvironmentClient.step))
    return calls


@ENGINES
def test_an_environment_that_dies_is_restarted_and_changes_nothing(
    ray_cluster, policy_folder, tmp_path, monkeypatch, engine
):
    """It is killed in the second step, and restarted by Ray in the third: weights and log equal
    those of an undisturbed run."""
    weights, logs = [], []
    for name in ("calm", "disturbed"):
        config = nemo_runs.tiny_config(policy_folder, tmp_path / name, *SHORT, engine)
        with monkeypatch.context() as patch:
            if name == "disturbed":
                # There are two calls a problem.
                calls = _at_calls(patch, {11: _kill, 19: _restart})
            [policy] = nemo_runs.train(config, shared=name == "calm").policies
        weights.append(policy.model.state_dict())
        logs.append(nemo_runs.metrics(tmp_path / name))
    assert len(calls) == 3 * 4 * 2
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    for calm, disturbed in zip(*logs, strict=True):
        names = [n for n in calm if n.startswith(("igrpo/", "reward/")) or n == "loss"]
        assert {n: calm[n] for n in names} == {n: disturbed[n] for n in names}


@ENGINES
def test_what_fails_for_good_fails_the_step_in_one_line(
    ray_cluster, policy_folder, tmp_path, monkeypatch, engine
):
    """The engine in the second stage of the second step, and once the checkpoint of the first one
    is resumed, the environment in the third: the steps before are logged, and no other."""
    sample, folder = generation.LocalGeneration._sample, tmp_path / "run"

    def failing(generation, prompts, greedy, **options):
        decode = generation._sampler.tokenizer.decode
        if generation.version == 1 and any("</draft>" in decode(prompt) for prompt in prompts):
            raise RuntimeError("engine on fire")
        return sample(generation, prompts, greedy, **options)

    saving = ["checkpointing.enabled=true", "checkpointing.save_period=1"]
    config = nemo_runs.tiny_config(policy_folder, folder, *SHORT, *saving, engine)
    with monkeypatch.context() as patch:
        patch.setattr(generation.LocalGeneration, "_sample", failing)
        with pytest.raises(RolloutError, match=r"stage refine.*engine on fire") as raised:
            nemo_runs.train(config)
    assert "\n" not in str(raised.value)
    assert len(nemo_runs.metrics(folder)) == 1
    _at_calls(monkeypatch, {11: _end})
    with pytest.raises(
        LostProcessError, match=r"^problem \S+, stage (draft|refine)\S*.*actor"
    ) as raised:
        launch.train(config)
    assert "\n" not in str(raised.value)
    assert len(nemo_runs.metrics(folder)) == 2
    assert not (folder / "finished").exists()


def test_a_reward_that_times_out_is_counted_and_the_step_completes(
    ray_cluster, policy_folder, tmp_path, monkeypatch
):
    """One answer of the first step takes for ever to compare: its group is whole, the verifier's
    fallback is its reward, and the log says so."""
    hanging = "<answer>9^{9^{9^{9}}}</answer>"
    complete = generation.LocalGeneration._output
    answered = []

    def output(generation, prompts, completions):
        from dataclasses import replace

        completions = list(completions)
        if not answered:
            answered.append(completions[0])
            ids = tuple(generation._sampler.tokenizer(hanging, add_special_tokens=False).input_ids)
            completions[0] = replace(
                completions[0], text=hanging, token_ids=ids, logprobs=(-1.0,) * len(ids)
            )
        return complete(generation, prompts, completions)

    monkeypatch.setattr(generation.LocalGeneration, "_output", output)
    options = ["env.math.num_workers=1", "env.math.item_timeout_s=1"]
    config = nemo_runs.tiny_config(policy_folder, tmp_path / "run", *SHORT, *options, SYNC)
    launch.train(config)
    logged = nemo_runs.metrics(tmp_path / "run")
    assert len(logged) == 3
    assert logged[0]["reward/reason/timeout"] == pytest.approx(1 / 32)
    assert all("reward/reason/timeout" not in each for each in logged[1:])

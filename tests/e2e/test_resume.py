"""A run that is killed or stopped at any moment ends like one that was left alone."""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import time

import pytest
from command_line import QUICK, SMALL, CommandLine, checked, records

SIX = (*QUICK, "grpo.max_num_steps=6", "logger.log_dir=run")
VOLATILE = ("perf/", "timing/", "reward/verifier/")
"""Metrics of the process, not of what is learned."""


def weights(run):
    file = run / "checkpoints" / "step_00000006" / "model" / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def learned(run):
    return {
        step: {name: v for name, v in metrics.items() if not name.startswith(VOLATILE)}
        for step, metrics in records(run, "train").items()
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, warmup_cache):
    folder = tmp_path_factory.mktemp("whole")
    keep = "checkpointing.keep_top_k=9"
    CommandLine(folder, warmup_cache)("train", *SIX, keep)
    return folder / "run"


def wait_for_steps(running, run, count):
    """Until so many steps are logged; a process that ends before fails the test."""
    deadline = time.monotonic() + 240
    log = run / "metrics.jsonl"
    while not log.exists() or log.read_text().count('"kind": "train"') < count:
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.02)


def test_killed_at_random_moments_it_ends_bit_for_bit_the_same(process, uninterrupted):
    """With the verifier's processes, which the killed one takes with it."""
    rng, run = random.Random(0), process.folder / "run"
    words = ("train", *SMALL, *SIX[-2:])
    for steps in (0, 1, 4):
        running = process.start(*words)
        wait_for_steps(running, run, steps)
        time.sleep(rng.uniform(0.0, 0.4))
        running.kill()
        running.end()
    process(*words)
    assert weights(run) == weights(uninterrupted)
    assert learned(run) == learned(uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_75(process, uninterrupted, number):
    running = process.start("train", *SIX)
    run = process.folder / "run"
    wait_for_steps(running, run, 1)
    running.send_signal(number)
    done = checked(running.end(), 75)
    assert "run again to continue" in done.stdout
    again = process.fresh if number == signal.SIGTERM else process
    again("train", *SIX)
    assert weights(run) == weights(uninterrupted)
    assert learned(run) == learned(uninterrupted)


def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(process, uninterrupted):
    run = process.folder / "run"
    shutil.copytree(uninterrupted, run)
    torn = run / "checkpoints" / "step_00000006" / "model" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-7])
    done = process("train", *SIX)
    assert "step_00000006" in done.stderr and "model.safetensors" in done.stderr
    assert "resuming after step 4" in done.stdout
    assert weights(run) == weights(uninterrupted)


def test_two_runs_never_write_one_folder(process):
    running = process.start("train", *SIX, "grpo.max_num_steps=60")
    run = process.folder / "run"
    wait_for_steps(running, run, 0)
    done = process("train", *SIX, code=2)
    running.kill()
    running.end()
    assert f"pid {running.pid}" in done.stderr and done.stderr.count("\n") == 1

"""A run that is killed or stopped at any moment ends like one that was left alone."""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import time

import pytest
from command_line import SMALL, CommandLine, records

VOLATILE = ("perf/", "timing/", "reward/verifier/")
"""Metrics of the process, not of what is learned."""


def weights(run):
    file = run / "checkpoints" / "step_00000010" / "model" / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def learned(run):
    return {
        step: {name: v for name, v in metrics.items() if not name.startswith(VOLATILE)}
        for step, metrics in records(run, "train").items()
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, warmup_cache):
    folder = tmp_path_factory.mktemp("whole")
    process = CommandLine(folder, warmup_cache)
    process("train", *SMALL, "grpo.max_num_steps=1", "logger.log_dir=warm")
    started = time.monotonic()
    process("train", *SMALL, "logger.log_dir=run")
    return folder / "run", time.monotonic() - started


def test_killed_at_random_moments_it_ends_bit_for_bit_the_same(igrpo, process, uninterrupted):
    whole, seconds = uninterrupted
    rng = random.Random(0)
    for _ in range(4):
        running = process.start("train", *SMALL, "logger.log_dir=run")
        time.sleep(rng.uniform(0.4, 1.0) * seconds)
        running.kill()
        running.communicate()
    igrpo("train", *SMALL, "logger.log_dir=run")
    run = igrpo.folder / "run"
    assert weights(run) == weights(whole)
    assert learned(run) == learned(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_75(igrpo, process, uninterrupted, number):
    whole, _ = uninterrupted
    running = process.start("train", *SMALL, "logger.log_dir=run")
    run = igrpo.folder / "run"
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not records(run, "train"):
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.05)
    running.send_signal(number)
    output, errors = running.communicate(timeout=120)
    assert running.returncode == 75, output + errors
    assert "run again to continue" in output
    igrpo("train", *SMALL, "logger.log_dir=run")
    assert weights(run) == weights(whole)
    assert learned(run) == learned(whole)


def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(igrpo, uninterrupted):
    whole, _ = uninterrupted
    run = igrpo.folder / "run"
    shutil.copytree(whole, run)
    torn = run / "checkpoints" / "step_00000010" / "model" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-7])
    done = igrpo("train", *SMALL, "logger.log_dir=run")
    assert "step_00000010" in done.stderr and "model.safetensors" in done.stderr
    assert "resuming after step 8" in done.stdout
    assert weights(run) == weights(whole)


def test_two_runs_never_write_one_folder(igrpo, process):
    running = process.start("train", *SMALL, "grpo.max_num_steps=60", "logger.log_dir=run")
    run = igrpo.folder / "run"
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    done = igrpo("train", *SMALL, "logger.log_dir=run", code=2)
    running.kill()
    running.communicate()
    assert f"pid {running.pid}" in done.stderr and done.stderr.count("\n") == 1

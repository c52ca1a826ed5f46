"""Checkpoints: round trip, crash safety at every system call, damage, a full disk, what is kept."""

import contextlib
import gc
import json
import math
import os
import random
import select
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from igrpo_nemo.config.nemo_keys import Checkpointing
from igrpo_nemo.errors import UserError
from igrpo_nemo.local import checkpoint
from igrpo_nemo.local.checkpoint import (
    CheckpointStore,
    CheckpointWarning,
    TrainerState,
    capture_rng,
    find_damage,
    restore_rng,
)


def write_model(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "shards").mkdir()
    (folder / "shards" / "model.safetensors").write_bytes(b"weights" * 100)


def store_in(folder: Path, metric: str | None = None, **keys: object) -> CheckpointStore:
    return CheckpointStore(
        Checkpointing(
            enabled=True,
            checkpoint_dir=str(folder),
            metric_name=metric,
            **{"higher_is_better": True, "keep_top_k": None, "save_period": 1, **keys},
        )
    )


def save(store: CheckpointStore, step: int, *, tensors=None, write=write_model, **metrics) -> Path:
    if tensors is None:
        tensors = {"optimizer": {"state": {0: {"exp_avg": torch.full((4,), float(step))}}}}
    return store.save(
        write_model=write,
        tensors=tensors,
        state=TrainerState(step=step, epoch=1, index=7, consumed_problems=8 * step),
        metrics=metrics,
    )


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.checkpoint_dir.iterdir())


def test_what_is_saved_is_loaded(tmp_path):
    store = store_in(tmp_path / "checkpoints")
    assert store.latest() is None
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    scheduler.step()
    tensors = {
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "rng": capture_rng(),
    }
    state = TrainerState(3, 1, 5, 24, {"order": [2, 0, 1], "name": "ü", "rate": 0.1})
    path = store.save(
        write_model=write_model,
        tensors=tensors,
        state=state,
        metrics={"val/accuracy": 0.25, "loss": math.nan},
    )
    assert path == store.latest() == tmp_path / "checkpoints" / "step_00000003"
    loaded = store.load(path)
    assert loaded.state == state
    assert loaded.metrics == {"val/accuracy": 0.25}
    assert (loaded.model_path / "config.json").read_text() == "{}"
    assert loaded.tensors["scheduler"] == scheduler.state_dict()
    for key, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            assert torch.equal(loaded.tensors["optimizer"]["state"][key][name], value)


def test_generators_continue_where_they_were(tmp_path):
    store = store_in(tmp_path)
    save(store, 1, tensors={"rng": capture_rng()})

    def draw():
        return random.random(), torch.rand(3).tolist(), np.random.rand()

    expected = draw()
    restore_rng(store.load(store.latest()).tensors["rng"])
    assert draw() == expected


def test_unsafe_tensors_are_refused_when_saving_and_leave_nothing(tmp_path):
    store = store_in(tmp_path)
    with pytest.raises(Exception, match="[Ww]eights.only"):
        save(store, 1, tensors={"object": TrainerState(1)})
    assert names(store) == []


def test_a_checkpoint_holding_code_is_never_executed(tmp_path):
    store = store_in(tmp_path)
    path = save(store, 1)

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"bomb": Bomb()}, path / "optimizer.pt")
    (path / "manifest.json").unlink()
    checkpoint.seal(path)  # an attacker can compute checksums too
    with pytest.raises(Exception, match="[Ww]eights.only"):
        store_in(tmp_path).load(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "name",
    ["model/config.json", "model/shards/model.safetensors", "optimizer.pt", "state.json"]
    + ["metrics.json", "manifest.json"],
)
def test_one_flipped_byte_anywhere_is_found_and_the_one_before_is_used(tmp_path, name):
    store = store_in(tmp_path)
    first, second = save(store, 1, loss=1.0), save(store, 2, loss=1.0)
    file = second / name
    content = file.read_bytes()
    positions = range(len(content)) if name == "manifest.json" else [0, len(content) // 2, -1]
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 0x01
        file.write_bytes(damaged)
        assert find_damage(second) == f"{name} does not match its checksum", position
    with pytest.warns(CheckpointWarning, match=f"step_00000002 is damaged.*{name}.*step_00000001"):
        assert store.latest() == first
    file.write_bytes(content)
    assert store.latest() == second


@pytest.mark.parametrize("name", ["model/config.json", "optimizer.pt", "manifest.json"])
def test_a_missing_or_cut_file_is_named(tmp_path, name):
    store = store_in(tmp_path)
    path = save(store, 1)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-1])
    with pytest.warns(CheckpointWarning, match=f"{name}.*no other one"):
        assert store.latest() is None
    (path / name).unlink()
    assert find_damage(path) == f"{name} is missing"


ACCURACIES = [{"val/accuracy": value} for value in (0.1, 0.9, 0.5, 0.9, 0.2)]
LIFTS = [{"igrpo/lift": value} for value in (0.3, -0.2, 0.1)]


@pytest.mark.parametrize(
    ("metric", "keys", "saved", "kept"),
    [
        # The sixth between two validations: it has no metric.
        ("val:accuracy", {"keep_top_k": 2}, [*ACCURACIES, {}], [2, 4, 6]),
        (
            "val:accuracy",
            {"keep_top_k": 2},
            [*ACCURACIES, {}, {"val/accuracy": math.nan}],
            [2, 4, 7],
        ),
        ("train:igrpo/lift", {"keep_top_k": 1, "higher_is_better": False}, LIFTS, [2, 3]),
        (None, {"keep_top_k": 2}, [{}, {}, {}], [2, 3]),
    ],
)
def test_the_best_by_metric_and_the_newest_are_kept(tmp_path, metric, keys, saved, kept):
    store = store_in(tmp_path, metric, **keys)
    for step, metrics in enumerate(saved, start=1):
        save(store, step, **metrics)
    assert names(store) == [f"step_{step:08d}" for step in kept]
    assert store.latest() == tmp_path / f"step_{kept[-1]:08d}"


def test_a_step_can_be_saved_again_and_later_ones_discarded(tmp_path):
    store = store_in(tmp_path)
    save(store, 1, loss=1.0)
    save(store, 2, loss=1.0)
    save(store, 2, loss=2.0)
    assert store.load(store.latest()).metrics == {"loss": 2.0}
    save(store, 3)
    store.discard_after(1)
    assert names(store) == ["step_00000001"]


def test_a_failing_writer_leaves_nothing_behind(tmp_path):
    store = store_in(tmp_path)
    first = save(store, 1)

    def interrupted(folder: Path) -> None:
        write_model(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(store, 2, write=interrupted, tensors={})
    assert names(store) == [first.name] and store.latest() == first


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the checkpoint of step 1 in .*file"):
        save(store_in(tmp_path / "file"), 1)


def test_a_checkpoint_is_due_at_every_period(tmp_path):
    store = store_in(tmp_path, save_period=5)
    assert [step for step in range(12) if store.due(step)] == [5, 10]


@contextlib.contextmanager
def tiny_disk(folder: Path, megabytes: int):
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(options, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("large", ["tensors", "safetensors", "torch.save"])
def test_a_full_disk_is_one_clear_line_and_loses_nothing(tmp_path, large):
    from safetensors.torch import save_file

    weights = {"w": torch.zeros(600_000)}  # 2.4 MB

    def write_large_model(folder: Path) -> None:
        write_model(folder)
        if large == "safetensors":
            save_file(weights, folder / "model.safetensors")
        elif large == "torch.save":
            torch.save(weights, folder / "pytorch_model.bin")

    with tiny_disk(tmp_path / "disk", megabytes=1) as disk:
        store = store_in(disk)
        first = save(store, 1)
        with pytest.raises(UserError) as caught:
            tensors = weights if large == "tensors" else {}
            save(store, 2, write=write_large_model, tensors=tensors)
        assert names(store) == [first.name]
        assert store.latest() == first and store.load(first).state.step == 1
        message = str(caught.value)
        del caught  # its traceback holds torch's writer, and that the space of a removed file
        gc.collect()
        assert str(disk) in message and "step 2" in message and "\n" not in message
        if large == "tensors":
            assert "at least 2.4 MB, 1.0 MB are free" in message
        save(store, 3)
        assert store.latest().name == "step_00000003"


def test_a_full_disk_without_root(tmp_path, monkeypatch):
    store = store_in(tmp_path)
    first = save(store, 1)

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "fsync_file", full)  # where delayed allocation reports it
    with pytest.raises(UserError, match="no space left for the checkpoint of step 2"):
        save(store, 2)
    monkeypatch.undo()
    assert names(store) == [first.name] and store.latest() == first


# Crashes: a process that has torch loaded forks a child per command, which saves and is killed.
SAVER = r"""
import os, sys
from pathlib import Path
import torch
from igrpo_nemo.config.nemo_keys import Checkpointing
from igrpo_nemo.local import checkpoint
from igrpo_nemo.local.checkpoint import CheckpointStore, TrainerState

def save(store, step):
    def write_model(folder):
        for part in range(3):
            (folder / f"part{part}").write_bytes(bytes([step % 256]) * 50_000)
    tensors = {"optimizer": torch.full((20_000,), float(step))}
    store.save(write_model=write_model, tensors=tensors, state=TrainerState(step),
               metrics={"val/accuracy": (step * 7 % 10) / 10})

def die_at_call(count):
    calls = 0
    def dying(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == count:
                os._exit(9)
            return function(*arguments, **options)
        return call
    for name in ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "open", "close"):
        setattr(os, name, dying(getattr(os, name)))
    checkpoint.torch.save = dying(torch.save)

for line in sys.stdin:
    mode, folder, number = line.split()
    child = os.fork()
    if child == 0:
        keys = dict(enabled=True, metric_name="val:accuracy", higher_is_better=True, save_period=1)
        store = CheckpointStore(Checkpointing(checkpoint_dir=folder, keep_top_k=1, **keys))
        newest = store.latest()
        step = 1 + (store.load(newest).state.step if newest else 0)
        if mode == "die":
            die_at_call(int(number))
            save(store, step)
            os._exit(0)
        if mode == "again":
            die_at_call(int(number))
            save(store, step - 1)
            os._exit(0)
        while True:
            save(store, step)
            step += 1
    print(child, flush=True)
    status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.fixture(scope="module")
def saver():
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    def order(mode: str, folder: Path, number: int = 0) -> int:
        process.stdin.write(f"{mode} {folder} {number}\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    def outcome() -> int:
        ready, _, _ = select.select([process.stdout], [], [], 240)
        assert ready, "the saving process hangs"
        return int(process.stdout.readline())

    yield order, outcome
    process.stdin.close()
    process.wait(timeout=10)


def loaded_step(folder: Path) -> int:
    """The step that a resume would start from, after checking that its parts belong together."""
    store = store_in(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a crash alone never leaves a damaged checkpoint
        latest = store.latest()
    for path in folder.glob("step_*"):
        assert find_damage(path) is None, path  # the ones about to be removed included
    if latest is None:
        return 0
    loaded = store.load(latest)
    step = loaded.state.step
    assert torch.equal(loaded.tensors["optimizer"], torch.full((20_000,), float(step)))
    for part in range(3):
        assert (loaded.model_path / f"part{part}").read_bytes() == bytes([step % 256]) * 50_000
    return step


def test_kill_9_while_saving_in_a_loop(tmp_path, saver):
    order, outcome = saver
    generator = random.Random(0)
    steps = [0]
    for _ in range(6):
        child = order("loop", tmp_path)
        time.sleep(generator.uniform(0.05, 0.3))
        os.kill(child, signal.SIGKILL)
        assert outcome() == -signal.SIGKILL
        steps.append(loaded_step(tmp_path))
    assert steps == sorted(steps) and steps[-1] > 6
    save(store_in(tmp_path, "val:accuracy", keep_top_k=1), steps[-1] + 1)
    assert all(path.name.startswith("step_") for path in tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["die", "again"])
def test_death_at_every_system_call(tmp_path, saver, mode):
    """`die` saves the next step, `again` the newest step once more, over an existing folder."""
    order, outcome = saver
    for number in range(1, 4):
        order("die", tmp_path, 10_000)
        assert outcome() == 0
        assert loaded_step(tmp_path) == number
    for call in range(1, 500):
        before = loaded_step(tmp_path)
        order(mode, tmp_path, call)
        finished = outcome() == 0
        assert loaded_step(tmp_path) in ({before} if mode == "again" else {before, before + 1})
        if finished:
            break
    assert finished and call > 20
    assert json.loads((store_in(tmp_path).latest() / "metrics.json").read_text())

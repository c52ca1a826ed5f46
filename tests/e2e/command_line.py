"""Runs of the command line, small enough for seconds: in this process, or in one of their own."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMALL = (
    "experiment=demo",
    # Enough to write the format now and then, so that rewards differ within groups.
    "igrpo.warmup.steps=120",
    "igrpo.warmup.batch_size=24",
    "igrpo.threads=1",
    "data.train.num_problems=64",
    "data.validation.num_problems=16",
    "grpo.num_prompts_per_step=4",
    "grpo.max_val_samples=16",
    "grpo.max_num_steps=10",
    "grpo.val_period=5",
    "checkpointing.save_period=2",
    "checkpointing.keep_top_k=2",
    "igrpo.sample_table_period=5",
)

QUICK = (*SMALL, "env.math.num_workers=0")
"""Without the verifier's processes, whose start takes longer than a run."""

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["igrpo_nemo.local.trainer"])


@dataclass(frozen=True)
class Done:
    """What a command came to."""

    returncode: int
    stdout: str
    stderr: str


class InProcess:
    """`igrpo` in this process, which saves the start of another one.

    Runs are folders of `folder`, which is the working directory meanwhile.
    """

    def __init__(self, folder: Path, monkeypatch: Any, capfd: Any, cache: Path) -> None:
        self.folder = folder
        self._capfd = capfd
        monkeypatch.chdir(folder)
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))

    def __call__(self, *words: str, code: int = 0) -> Done:
        from igrpo_nemo.cli import main

        self._capfd.readouterr()
        returned = main(words)
        done = Done(returned, *self._capfd.readouterr())
        assert returned == code, f"exit {returned}\n{done.stdout}\n{done.stderr}"
        return done


class Running:
    """`igrpo` in a process of its own, forked from one that has imported the trainer already."""

    def __init__(self, folder: Path, env: Mapping[str, str], words: tuple[str, ...]) -> None:
        self._outputs = [folder / f"{time.monotonic_ns()}.{name}" for name in ("out", "err")]
        arguments = (str(folder), dict(env), words, [str(path) for path in self._outputs])
        self._process = FORKS.Process(target=command, args=arguments, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def end(self, timeout: float = 500) -> Done:
        """Waits for it; what it wrote."""
        self._process.join(timeout)
        code = self._process.exitcode
        assert code is not None, f"igrpo goes on after {timeout:.0f} s"
        return Done(code, *(path.read_text() for path in self._outputs))


def command(folder: str, env: dict[str, str], words: tuple[str, ...], outputs: list[str]) -> None:
    """`python -m igrpo_nemo WORDS` in the forked process."""
    os.chdir(folder)
    os.environ.update(env)
    for number, path in enumerate(outputs, start=1):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), number)
    from igrpo_nemo.cli import main

    sys.exit(main(words))


class CommandLine:
    """`igrpo` in processes of their own, for what a process is killed, stopped or locked out."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self.env = os.environ | {"XDG_CACHE_HOME": str(cache)}
        self._started: list[Running] = []

    def start(self, *words: str) -> Running:
        self._started.append(Running(self.folder, self.env, words))
        return self._started[-1]

    def __call__(self, *words: str, code: int = 0) -> Done:
        return checked(self.start(*words).end(), code)

    def fresh(self, *words: str, code: int = 0) -> Done:
        """In a new interpreter, as a user starts it."""
        python = [sys.executable, "-m", "igrpo_nemo", *words]
        done = subprocess.run(
            python, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=500
        )
        return checked(Done(done.returncode, done.stdout, done.stderr), code)

    def close(self) -> None:
        for running in self._started:
            running.kill()


def checked(done: Done, code: int) -> Done:
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def records(run: Path, kind: str) -> dict[int, dict[str, float]]:
    """The metrics of a run by step; fails where a step was logged twice."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    chosen = [(line["step"], line["metrics"]) for line in lines if line["kind"] == kind]
    assert len({step for step, _ in chosen}) == len(chosen), f"a {kind} step stands twice"
    return dict(chosen)

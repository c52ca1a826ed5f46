"""Runs of the command line, small enough for seconds: in this process, or in one of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMALL = (
    "experiment=demo",
    # Enough to write the format now and then, so that rewards differ within groups.
    "igrpo.warmup.steps=80",
    "igrpo.warmup.batch_size=24",
    "igrpo.threads=1",
    "grpo.num_prompts_per_step=4",
    "grpo.max_val_samples=16",
    "grpo.max_num_steps=10",
    "grpo.val_period=5",
    "checkpointing.save_period=2",
    "checkpointing.keep_top_k=2",
    "igrpo.sample_table_period=5",
)


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


class CommandLine:
    """`igrpo` in processes of their own, for what a process is killed, stopped or locked out."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self.env = os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "igrpo_nemo", *words],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words: str, code: int = 0) -> Done:
        process = self.start(*words)
        output = process.communicate(timeout=500)
        done = Done(process.returncode, *output)
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done


def records(run: Path, kind: str) -> dict[int, dict[str, float]]:
    """The metrics of a run by step; fails where a step was logged twice."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    chosen = [(line["step"], line["metrics"]) for line in lines if line["kind"] == kind]
    assert len({step for step, _ in chosen}) == len(chosen), f"a {kind} step stands twice"
    return dict(chosen)

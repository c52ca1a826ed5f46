"""Runs of the command line in processes of their own, small enough for seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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


class CommandLine:
    """`igrpo` with a warm-up cache of its own; runs are folders of a temporary directory."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self.env = os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "igrpo_nemo", *words]

    def __call__(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*words),
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*words),
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def records(run: Path, kind: str) -> dict[int, dict[str, float]]:
    """The metrics of a run by step; fails where a step was logged twice."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    chosen = [(line["step"], line["metrics"]) for line in lines if line["kind"] == kind]
    assert len({step for step, _ in chosen}) == len(chosen), f"a {kind} step stands twice"
    return dict(chosen)

"""The embedded engine against TRL: time, memory, and whether both compute the same.

    python benchmarks/local_vs_trl.py [--rounds N] [--json] [--NAME VALUE ...]

Both sides train the same small model on the same problems with the same budget and one update per
rollout, each in a process of its own on one thread. The processes take turns, step by step, so
that whatever else the machine does meets both. TRL's two-stage rollout is our environment inside
its `rollout_func`, with its own generation; its one-stage side is its plain GRPO trainer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("engine_worker.py")
SIDES = ("local", "trl")
STAGES = ("two", "one")
GROUP_SIZES = (8, 16, 32, 64)
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    # A waiting thread must not burn the CPU time that is measured.
    "OMP_WAIT_POLICY": "PASSIVE",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class Worker:
    """A process that does one training step whenever it is told to."""

    def __init__(self, side: str, stages: str, folder: Path, setting: str) -> None:
        self._log = (folder / f"{side}-{stages}.log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), side, stages, str(folder), setting],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=ENVIRONMENT,
        )
        self._answer()

    def step(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise SystemExit(f"a worker failed:\n{self._log.read()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._log.close()


def measure(folder: Path, setting: str, stages: str, rounds: int) -> dict[str, dict[str, float]]:
    """CPU seconds, memory and sizes per side: means over `rounds` alternating steps."""
    workers = {side: Worker(side, stages, folder, setting) for side in SIDES}
    steps: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(rounds + 1):
        for side, worker in workers.items():
            result = worker.step()
            # The first step pays for caches and lazy imports, on both sides.
            if number:
                steps[side].append(result)
    for worker in workers.values():
        worker.close()
    return {side: _summary(results) for side, results in steps.items()}


def _summary(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    cpu = sum(result["cpu"] for result in results)
    parts = {
        f"{name}_seconds": statistics.mean(result["parts"][name] for result in results)
        for name in results[0]["parts"]
    }
    return {
        "completions_per_cpu_second": sum(result["completions"] for result in results) / cpu,
        "cpu_seconds_per_step": cpu / len(results),
        **parts,
        "peak_mb": max(result["peak_mb"] for result in results),
        "idle_mb": results[0]["idle_mb"],
        "prompt_tokens": statistics.mean(result["prompt_tokens"] for result in results),
        "completion_tokens": statistics.mean(result["completion_tokens"] for result in results),
    }


def check(folder: Path, setting: str) -> dict[str, float]:
    """The largest difference of log-probs and of the first step's gradient, same rows."""
    import torch

    for side in SIDES:
        _run([side, "check", str(folder), setting])
    ours, theirs = (torch.load(folder / f"{side}.pt") for side in SIDES)
    return {
        "largest_logprob_difference": max(
            (a - b).abs().max().item()
            for a, b in zip(ours["logprobs"], theirs["logprobs"], strict=True)
        ),
        "largest_gradient_difference": max(
            (ours["gradient"][name] - gradient).abs().max().item()
            for name, gradient in theirs["gradient"].items()
        ),
        "largest_gradient": max(g.abs().max().item() for g in theirs["gradient"].values()),
    }


def memory_by_group(folder: Path, setting: str) -> dict[str, float]:
    """Peak memory of one update in MB for each group size, at fixed lengths."""
    return {
        str(size): json.loads(_run(["local", "memory", str(folder), setting, str(size)]))["mb"]
        for size in GROUP_SIZES
    }


def _run(arguments: Sequence[str]) -> str:
    done = subprocess.run(
        [sys.executable, str(WORKER), *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments[:2])} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def write_rows(folder: Path, setting: Any) -> None:
    """Rows of uneven lengths for the check, from a fixed random state."""
    import random

    rng = random.Random(setting.seed)
    rows = []
    for group in range(setting.problems):
        context = [rng.randrange(40, 240) for _ in range(setting.refinement_tokens - 7 * group)]
        for _ in range(setting.num_refinements):
            length = rng.randrange(setting.max_completion // 2, setting.max_completion)
            ids = [rng.randrange(40, 240) for _ in range(length)]
            rows.append({"group": group, "context": context, "ids": ids, "reward": rng.random()})
    (folder / "rows.json").write_text(json.dumps(rows))


def main(arguments: Sequence[str] | None = None) -> int:
    from engine_setting import Setting

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="measured steps a side")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    for field in fields(Setting):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default))
    flags = vars(parser.parse_args(arguments))
    names = [field.name for field in fields(Setting)]
    setting = Setting(**{name: flags[name] for name in names if flags[name] is not None})
    with tempfile.TemporaryDirectory() as scratch:
        folder, text = Path(scratch), json.dumps(asdict(setting))
        _run(["local", "build", str(folder), text])
        write_rows(folder, setting)
        agreement = check(folder, text)
        sides = {stages: measure(folder, text, stages, flags["rounds"]) for stages in STAGES}
        memory = memory_by_group(folder, text)
    result = {
        **{f"{stages}_stage_speedup": _speedup(sides[stages]) for stages in STAGES},
        "two_stage_memory_ratio": sides["two"]["local"]["peak_mb"] / sides["two"]["trl"]["peak_mb"],
        **agreement,
        "two_stage": sides["two"],
        "one_stage": sides["one"],
        "memory_mb_by_group_size": memory,
        "setting": asdict(setting),
    }
    print(json.dumps(result) if flags["json"] else table(result))
    return 0


def _speedup(sides: Mapping[str, Mapping[str, float]]) -> float:
    name = "completions_per_cpu_second"
    return sides["local"][name] / sides["trl"][name]


def table(result: Mapping[str, Any]) -> str:
    lines = [
        f"{'':22}{'completions/CPU s':>19}{'CPU s/step':>12}{'rollout':>9}{'update':>9}"
        f"{'peak MB':>9}{'prompt':>8}{'completion':>12}"
    ]
    for stages in STAGES:
        for side in SIDES:
            row = result[f"{stages}_stage"][side]
            lines.append(
                f"{f'{stages}-stage, {side}':22}{row['completions_per_cpu_second']:19.1f}"
                f"{row['cpu_seconds_per_step']:12.2f}{row['rollout_seconds']:9.2f}"
                f"{row['update_seconds']:9.2f}{row['peak_mb']:9.0f}{row['prompt_tokens']:8.0f}"
                f"{row['completion_tokens']:12.1f}"
            )
    sizes = result["memory_mb_by_group_size"]
    grown = ", ".join(f"G = {size}: {mb:.0f} MB" for size, mb in sizes.items())
    lines += [
        "",
        f"two-stage: {result['two_stage_speedup']:.2f} times TRL's completions per CPU second "
        f"at {result['two_stage_memory_ratio']:.2f} of its peak memory",
        f"one-stage: {result['one_stage_speedup']:.2f} times",
        f"same rows: log-probs differ by at most {result['largest_logprob_difference']:.1e}, the "
        f"first gradient by {result['largest_gradient_difference']:.1e} "
        f"(its largest entry is {result['largest_gradient']:.1e})",
        f"memory of an update at fixed lengths: {grown}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

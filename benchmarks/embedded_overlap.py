"""What `igrpo.draft_prefetch` and `igrpo.short_circuit` are worth on the embedded engine.

Runs of the demo, alternating between the options; CPU seconds of this process, so that other
work on the machine matters little. A step is the difference between a long and a short run, which
leaves out the start, the first step and the last one.

    python benchmarks/embedded_overlap.py [--steps 10] [--rounds 3] [--json FILE] [key=value ...]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

# Before torch is imported: a thread that spins while it waits would count as work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from igrpo_nemo.config import load_config  # noqa: E402
from igrpo_nemo.local.trainer import train  # noqa: E402

MODES = {
    "off": [],
    "fused": ["igrpo.draft_prefetch=fused"],
    "index_order": ["igrpo.short_circuit=index_order"],
    "first": ["igrpo.short_circuit=first"],
}
BARE = [
    "experiment=demo",
    "grpo.val_period=0",
    "grpo.val_at_start=false",
    "grpo.val_at_end=false",
    "checkpointing.enabled=false",
    "checkpointing.metric_name=null",
    "logger.tensorboard_enabled=false",
    "igrpo.sample_table_period=0",
    "igrpo.schedule.decay=constant",
    "igrpo.schedule.warmup_ratio=0.0",
    "igrpo.threads=1",
]


def cpu_seconds(mode: str, steps: int, overrides: Sequence[str]) -> float:
    """CPU time of a run of so many steps."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = load_config(
            [
                *BARE,
                *overrides,
                *MODES[mode],
                f"grpo.max_num_steps={steps}",
                f"logger.log_dir={Path(folder) / 'run'}",
            ]
        )
        started = time.process_time()
        train(config)
        return time.process_time() - started


def measure(steps: int, rounds: int, overrides: Sequence[str]) -> dict[str, list[float]]:
    """CPU seconds a step, by mode, once for each round."""
    cpu_seconds("off", 1, overrides)  # The warm-up, and everything that is loaded once.
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(rounds):
        for mode, seconds in found.items():
            short, long = (cpu_seconds(mode, count, overrides) for count in (2, 2 + steps))
            seconds.append((long - short) / steps)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time of a step, by option.")
    parser.add_argument("--steps", type=int, default=10, help="steps that are measured")
    parser.add_argument("--rounds", type=int, default=3, help="times that each option is measured")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("overrides", nargs="*", help="keys of the config, as for igrpo train")
    arguments = parser.parse_args()
    found = measure(arguments.steps, arguments.rounds, arguments.overrides)
    ratios = {
        mode: [s / off for s, off in zip(seconds, found["off"], strict=True)]
        for mode, seconds in found.items()
    }
    print(f"{'option':<12} {'CPU s/step':>10} {'over off':>9} {'range':>13}")
    for mode, seconds in found.items():
        low, high = min(ratios[mode]), max(ratios[mode])
        middle = statistics.median(ratios[mode])
        spread = f"{low:.2f}-{high:.2f}"
        print(f"{mode:<12} {statistics.median(seconds):>10.3f} {middle:>9.2f} {spread:>13}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"cpu_s_per_step": found, "ratio": ratios}, indent=1))


if __name__ == "__main__":
    main()

"""Where a run's time goes, and what it costs: wall clock by part, rates, peak memory."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from igrpo_nemo.types import Rollout


class Stopwatch:
    """Adds up seconds by name: `with watch("draft"): ...`; `lap()` returns and forgets them."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._lap_start = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """Seconds by name since the last lap, and `step`: the wall clock of the whole lap."""
        now = time.perf_counter()
        seconds = {**self._seconds, "step": now - self._lap_start}
        self._seconds.clear()
        self._lap_start = now
        return seconds


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB (10^9 bytes): of the GPU's allocator, or of this process on a CPU.

    The allocator's peak is what the paper's appendix D.1 reports.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss, which a Linux process inherits from the one that started it.
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS counts in bytes


def performance(
    sampled: Sequence[Rollout], seconds: Mapping[str, float], before: Mapping, device: torch.device
) -> tuple[dict[str, float], dict]:
    """`timing/*` and `perf/*` of a step; and the seconds and completions of the run, which `before`
    has without this step's.

    Rates count everything sampled, kept or not; `perf/samples_per_s` counts problems, as the
    paper's appendix D.1 does.
    """
    lengths = [
        len(completion.token_ids)
        for rollout in sampled
        for group in (rollout.drafts, *rollout.refinements)
        for completion in group.completions
    ]
    total = {
        "seconds": before.get("seconds", 0.0) + seconds["step"],
        "completions": before.get("completions", 0) + len(lengths),
    }
    metrics = {
        **{f"timing/{name}": value for name, value in seconds.items()},
        "perf/samples_per_s": len(sampled) / seconds["step"],
        "perf/completions_per_s": len(lengths) / seconds["step"],
        "perf/tokens_per_s": sum(lengths) / seconds["step"],
        "perf/peak_memory_gb": peak_memory_gb(device),
        "perf/gpu_hours": total["seconds"] / 3600,
    }
    return metrics, total

"""Where a step's time goes, and what it costs: wall clock by part, peak memory, device hours."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


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

"""`summary.json`: what a run came to, in a handful of numbers."""

from __future__ import annotations

import os
import time
from pathlib import Path

from igrpo_nemo.local.checkpoint import TrainerState


def summarize(state: TrainerState, session_seconds: float) -> dict[str, object]:
    """The result of a run.

    `seconds` is the wall clock of the whole command with an empty warm-up cache: of this process
    and those it resumed, plus what the warm-up took when it was made, if it came from the cache.
    Accuracies are fractions, on held-out problems, single shot on the bare prompt.
    """
    extra = state.extra
    cached_warmup = extra.get("warmup_seconds", 0.0) if extra.get("warmup_cached") else 0.0
    training = extra.get("seconds", 0.0)
    completions = extra.get("completions", 0)
    return {
        "val_accuracy_start": extra.get("val_accuracy_start"),
        "val_accuracy_end": extra.get("val_accuracy_end"),
        "steps": state.step,
        "seconds": extra.get("earlier_seconds", 0.0) + session_seconds + cached_warmup,
        "training_seconds": training,
        "warmup_seconds": extra.get("warmup_seconds"),
        "warmup_cached": bool(extra.get("warmup_cached")),
        "completions": completions,
        "completions_per_second": completions / training if training else None,
    }


def process_seconds() -> float:
    """Seconds since this process started, imports included (Linux; elsewhere since this import)."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return time.monotonic() - _IMPORTED
    # Field 22 of proc(5), `starttime`, is the 20th behind the command's name.
    return uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")


_IMPORTED = time.monotonic()

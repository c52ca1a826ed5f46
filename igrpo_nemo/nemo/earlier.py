"""What a run did before it was resumed, which NeMo-RL's checkpoints do not hold.

metrics.jsonl (up to the checkpoint), summary.json ─> Earlier ─> RunLog, the new summary
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Earlier:
    """Of the `steps` before a resume: accuracies are None where nothing was validated.

    `seconds` is the wall clock, as the last summary has it; a job that was killed wrote none, and
    of such ones only the steps count.
    """

    steps: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0
    completions: int = 0
    first_accuracy: float | None = None
    last_accuracy: float | None = None

    @classmethod
    def of(cls, folder: Path, steps: int) -> Earlier:
        """From a run folder whose log ends with step `steps`, which the run is resumed after."""
        if not steps:
            return cls()
        log = folder / "metrics.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
        records = [json.loads(line) for line in lines]
        trained = [record["metrics"] for record in records if record["kind"] == "train"]
        validated = [record["metrics"] for record in records if record["kind"] == "val"]
        accuracies = [each["val/accuracy"] for each in validated if "val/accuracy" in each]
        training_seconds = sum(step.get("timing/step", 0.0) for step in trained)
        return cls(
            steps=steps,
            seconds=max(training_seconds, summary_of(folder).get("seconds") or 0.0),
            training_seconds=training_seconds,
            completions=int(sum(step.get("igrpo/completions", 0.0) for step in trained)),
            first_accuracy=accuracies[0] if accuracies else None,
            last_accuracy=accuracies[-1] if accuracies else None,
        )


def summary_of(folder: Path) -> dict[str, Any]:
    """The summary in a run folder; empty where there is none yet."""
    path = folder / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

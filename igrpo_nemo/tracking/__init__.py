"""What a run tells: engine -> Tracker (JSONL in the run folder, TensorBoard, wandb, MLflow) and
Console (a line a step)."""

from igrpo_nemo.tracking.console import Console
from igrpo_nemo.tracking.tracker import Tracker, open_tracker

__all__ = ["Console", "Tracker", "open_tracker"]

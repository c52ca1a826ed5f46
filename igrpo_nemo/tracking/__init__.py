"""What a run tells: metric sinks, samples, and the console.

engine -> Tracker (JSONL in the run folder, TensorBoard, wandb, MLflow), console (terminal)
"""

from igrpo_nemo.tracking.console import open_console
from igrpo_nemo.tracking.tracker import Tracker, open_tracker

__all__ = ["Tracker", "open_console", "open_tracker"]

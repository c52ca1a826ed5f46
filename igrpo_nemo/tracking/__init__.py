"""What a run tells: the run folder, metric sinks and the console.

trainer -> RunFolder (files), Tracker (JSONL, TensorBoard, wandb, MLflow), console (terminal)
"""

from igrpo_nemo.files.scrub import scrub
from igrpo_nemo.tracking.console import open_console
from igrpo_nemo.tracking.run_folder import RunFolder
from igrpo_nemo.tracking.tracker import Tracker, open_tracker

__all__ = ["RunFolder", "Tracker", "open_console", "open_tracker", "scrub"]

"""The core's parts for this engine, from a config: problems, prompts, rewards, feedback."""

from __future__ import annotations

from igrpo_nemo.local.problems import fitting_problems, training_problems, validation_problems
from igrpo_nemo.local.settings import feedback_of, prompt_builder, scorer_of

__all__ = [
    "feedback_of",
    "fitting_problems",
    "prompt_builder",
    "scorer_of",
    "training_problems",
    "validation_problems",
]

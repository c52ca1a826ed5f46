"""Rewards: verifiable accuracy, format, an optional judge, and their weighted sum."""

from igrpo_nemo.rewards.accuracy import Reason, Verdict
from igrpo_nemo.rewards.extract import AnswerFormat, extract_answer, format_reward
from igrpo_nemo.rewards.weighted import (
    DEFAULT_WEIGHTS,
    Scorer,
    WeightedScorer,
    build_scorer,
)
from igrpo_nemo.types import ScoreRequest

__all__ = [
    "DEFAULT_WEIGHTS",
    "AnswerFormat",
    "Reason",
    "ScoreRequest",
    "Scorer",
    "Verdict",
    "WeightedScorer",
    "build_scorer",
    "extract_answer",
    "format_reward",
]

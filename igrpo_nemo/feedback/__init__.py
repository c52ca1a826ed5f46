"""Feedbacks: what Stage 2 sees and which rows are trained. See `protocol` for the contract."""

from igrpo_nemo.feedback.best_draft import BestDraft
from igrpo_nemo.feedback.none import NoFeedback
from igrpo_nemo.feedback.protocol import Feedback, NextPrompt

__all__ = ["BestDraft", "Feedback", "NextPrompt", "NoFeedback"]

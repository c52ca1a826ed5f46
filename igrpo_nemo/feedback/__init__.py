"""Feedbacks: what Stage 2 sees and which rows are trained. See `protocol` for the contract.

A feedback is a file here, a line in `FEEDBACKS` and a group in `configs/feedback/`; nothing else
knows it by name.
"""

from igrpo_nemo.feedback.best_draft import BestDraft
from igrpo_nemo.feedback.none import NoFeedback
from igrpo_nemo.feedback.protocol import Feedback, NextPrompt

FEEDBACKS: dict[str, type[Feedback]] = {"none": NoFeedback, "best_draft": BestDraft}
"""The feedback of each value of `igrpo.feedback`."""

__all__ = ["FEEDBACKS", "BestDraft", "Feedback", "NextPrompt", "NoFeedback"]

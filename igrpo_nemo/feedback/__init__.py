"""Feedbacks: what Stage 2 sees and which rows are trained. See `protocol` for the contract.

A feedback is a file here, a line in `FEEDBACKS` and a group in `configs/feedback/`; nothing else
knows it by name. One that stands elsewhere is named by its path, `module:Class`.
"""

from igrpo_nemo.by_path import imported
from igrpo_nemo.errors import UserError
from igrpo_nemo.feedback.baselines import Exemplar, NoFeedback
from igrpo_nemo.feedback.best_draft import BestDraft
from igrpo_nemo.feedback.critique import Critique
from igrpo_nemo.feedback.protocol import Feedback, NextPrompt
from igrpo_nemo.feedback.self_verification import SelfVerification

FEEDBACKS: dict[str, type[Feedback]] = {
    "none": NoFeedback,
    "best_draft": BestDraft,
    "critique": Critique,
    "self_verification": SelfVerification,
    "exemplar": Exemplar,
}
"""The feedback of each value of `igrpo.feedback`."""


def feedback_class(name: str) -> type[Feedback]:
    """The class that `igrpo.feedback` names: one of `FEEDBACKS`, or `module:Class`.

    Raises `UserError` for an unknown name and for a path that leads to no feedback; the message
    goes on from "igrpo.feedback=NAME".
    """
    if name in FEEDBACKS:
        return FEEDBACKS[name]
    if ":" not in name:
        known = " or ".join(map(repr, FEEDBACKS))
        raise UserError(f"should be {known}, or module:Class for one of your own")
    found = imported(name)
    needed = ("of", "select", "next_prompts", "training_rows", "problems")
    needed += ("num_trained", "num_prompts")
    if missing := [each for each in needed if not hasattr(found, each)]:
        raise UserError(f"is no feedback: it has no {', '.join(missing)}; see feedback/protocol.py")
    return found


__all__ = [
    "FEEDBACKS",
    "BestDraft",
    "Critique",
    "Exemplar",
    "Feedback",
    "NextPrompt",
    "NoFeedback",
    "SelfVerification",
    "feedback_class",
]

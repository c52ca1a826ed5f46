"""Rows of `samples.jsonl` and of the sample table: one problem's draft beside its refinement."""

from __future__ import annotations

from collections.abc import Sequence

from igrpo_nemo.types import Group, Rollout


def sample_rows(rollouts: Sequence[Rollout], limit: int = 8) -> list[dict[str, object]]:
    """The first `limit` rollouts as flat records; refinement fields are null without Stage 2.

    The draft is the one that was selected; where none was shown it is the group's first.
    """
    rows = []
    for rollout in rollouts[:limit]:
        selection = rollout.selection
        shown = selection is not None and selection.index is not None
        index = selection.index if selection is not None and selection.index is not None else 0
        draft, draft_score = rollout.drafts.completions[index], rollout.drafts.scores[index]
        row: dict[str, object] = {
            "problem_id": rollout.problem.id,
            "question": rollout.problem.question,
            "answer": rollout.problem.answer,
            "draft": draft.text,
            "draft_shown": shown,
            "draft_reward": draft_score.reward,
            "draft_correct": draft_score.correct,
            "refinement": None,
            "refinement_reward": None,
            "refinement_correct": None,
        }
        if rollout.refinements:
            refined = rollout.refinements[0]
            row["refinement"] = refined.completions[0].text
            row["refinement_reward"] = refined.scores[0].reward
            row["refinement_correct"] = refined.scores[0].correct
        rows.append(row)
    return rows


def response_rows(answers: Sequence[Group], limit: int) -> list[dict[str, object]]:
    """The first `limit` problems of a validation, each with its first answer."""
    return [
        {
            "problem_id": group.problem.id,
            "question": group.problem.question,
            "answer": group.problem.answer,
            "response": group.completions[0].text,
            "response_reward": group.scores[0].reward,
            "response_correct": group.scores[0].correct,
        }
        for group in answers[:limit]
    ]

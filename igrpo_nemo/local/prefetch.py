"""Drafts that are sampled ahead, between two steps: `igrpo.draft_prefetch`.

    Stage 2 of step k, in the same call of the sampler: the drafts of step k+1 -> DraftsAhead
    DraftsAhead -> Stage 1 of step k+1, and into the checkpoint of step k

On-policy: refinements, which come from the current weights, given q'. One update behind: the
drafts, and so the choice of q'. Being part of the checkpoint, they are the same after a resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from igrpo_nemo.data.order import Position
from igrpo_nemo.local.rollout import Drafts
from igrpo_nemo.types import Completion, Problem, StopReason


@dataclass(frozen=True, slots=True)
class DraftsAhead:
    """Drafts of the batch that begins at `position`, made when `made_at` steps were finished."""

    position: Position
    problem_ids: tuple[str, ...]
    drafts: Drafts
    made_at: int

    def fit(self, position: Position, problems: Sequence[Problem]) -> bool:
        """Whether they were made for this very batch."""
        return position == self.position and self.problem_ids == tuple(p.id for p in problems)

    def state_dict(self) -> dict[str, object]:
        """Plain values and tensors, which load with `weights_only=True`."""
        completions = [completion for rows in self.drafts for completion in rows]
        token_ids = [token for each in completions for token in each.token_ids]
        logprobs = [logprob for each in completions for logprob in each.logprobs]
        return {
            "position": [self.position.epoch, self.position.index],
            "problem_ids": list(self.problem_ids),
            "made_at": self.made_at,
            "rows": [len(rows) for rows in self.drafts],
            "lengths": [len(each.token_ids) for each in completions],
            "token_ids": torch.tensor(token_ids, dtype=torch.int64),
            "logprobs": torch.tensor(logprobs, dtype=torch.float64),
            "texts": [each.text for each in completions],
            "stop_reasons": [each.stop_reason.value for each in completions],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> DraftsAhead:
        """Undoes `state_dict`, to the last bit."""
        token_ids, logprobs = iter(state["token_ids"].tolist()), iter(state["logprobs"].tolist())
        completions = iter(
            [
                Completion(
                    text,
                    tuple(islice(token_ids, length)),
                    tuple(islice(logprobs, length)),
                    StopReason(reason),
                )
                for text, length, reason in zip(
                    state["texts"], state["lengths"], state["stop_reasons"], strict=True
                )
            ]
        )
        return cls(
            position=Position(*state["position"]),
            problem_ids=tuple(state["problem_ids"]),
            drafts=tuple(tuple(islice(completions, count)) for count in state["rows"]),
            made_at=state["made_at"],
        )

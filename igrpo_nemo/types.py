"""The nouns of a two-stage rollout, as frozen data.

    Problem --prompts--> Prompt --engine--> Completion --rewards--> Score
    Group = one prompt, its completions, their scores
    Rollout = what one problem produced in one step: drafts, selection, refinements, training rows

Every part of the project speaks in these types; none of them knows torch, Ray or a tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Stage(StrEnum):
    """Which half of an iGRPO step a completion belongs to (paper section 3.2.2): sampled from the
    bare prompt q, with feedback `none` the only stage, or from q' = Concat(q, feedback)."""

    DRAFT = "draft"
    REFINE = "refine"


class StopReason(StrEnum):
    """Why the engine stopped a completion: at an end-of-sequence token, which is its last token, a
    configured stop string, which is part of it, or the token limit."""

    EOS = "eos"
    STOP_STRING = "stop_string"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with its reference answer, as the data set has it (raw, untemplated); `columns`:
    the row's others as JSON text, kept for `igrpo.reward.custom` alone."""

    id: str
    question: str
    answer: str
    columns: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered prompt, q or q'.

    `token_ids` are authoritative: data inside the prompt never becomes a control token there.
    `text` is for logs and reports. `thinking_open` says that the chat template ends the prompt
    inside a thinking part (`<think>`), so that a completion need not open it again.
    `draft_tokens` of the draft are shown in q', after `draft_tokens_dropped` were cut to fit.
    """

    text: str
    token_ids: tuple[int, ...]
    thinking_open: bool = False
    draft_tokens: int = 0
    draft_tokens_dropped: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion.

    `token_ids` hold the end-of-sequence token when there was one; `text` does not. `logprobs` are
    nats per token under the temperature-scaled, untruncated softmax of the policy that sampled it.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop_reason: StopReason

    @property
    def truncated(self) -> bool:
        return self.stop_reason is StopReason.LENGTH


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A completion to score. `thinking_open`: the prompt ended inside a thinking part. `truncated`:
    it met the token limit."""

    problem: Problem
    text: str
    thinking_open: bool = False
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of one completion: a weighted sum, and what it was made of.

    `components` are unweighted (`accuracy`, `format`, ...), each in [0, 1] but for those of
    `igrpo.reward.custom`, which are as returned; `reason` is the accuracy verdict's (`match`,
    `mismatch`, `no_answer`, ...).
    """

    reward: float
    components: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def correct(self) -> bool:
        """Whether the answer matched the reference, whatever else the reward contains."""
        return self.components.get("accuracy", self.reward) >= 1.0


@dataclass(frozen=True, slots=True)
class Target:
    """What a Stage 2 completion must answer where that is not the problem's answer.

    The right answer is `word`, one of the words `among`, which all are lower case; it earns
    `reward`, and any other answer earns 0.
    """

    word: str
    among: tuple[str, ...]
    reward: float


@dataclass(frozen=True, slots=True)
class Group:
    """The scored completions of one prompt: the unit over which advantages are relative (Eq. 4).

    With a `target` they were scored against that, not against the problem's answer.
    """

    problem: Problem
    stage: Stage
    prompt: Prompt
    completions: tuple[Completion, ...]
    scores: tuple[Score, ...]
    target: Target | None = None

    @property
    def rewards(self) -> tuple[float, ...]:
        return tuple(score.reward for score in self.scores)

    @property
    def share_right(self) -> float:
        return sum(score.correct for score in self.scores) / len(self.scores)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which draft was chosen from a group of drafts, and by which rule.

    `index` is None where no draft is shown (draft choice `none`, or dropped by an option), or
    where every Stage 2 prompt shows another one: `each` then holds these drafts, prompt by prompt.
    `skipped` says that the problem has no Stage 2 and no training rows in this step. `remembered`
    counts in what the feedback keeps of earlier steps, where that is shown and no draft.
    """

    index: int | None
    rule: str
    skipped: bool = False
    each: tuple[int, ...] = ()
    remembered: int | None = None

    @property
    def shown(self) -> tuple[int, ...]:
        """The drafts that are shown, prompt by prompt; empty where a prompt shows none."""
        return self.each or (() if self.index is None else (self.index,))


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One trained completion with the context it is trained under.

    Rows with an equal `group` share a baseline. Which rows exist, and under which context, is the
    feedback's choice alone (`feedback.training_rows`).

    `weight` is the row's share of the loss, beside the others' 1; it does not touch the baseline.
    `shaped`: the row was sampled under another context than it is trained under, so the objective
    takes p / (p + `igrpo.shaping_gamma`) in the place of the ratio to a policy that never sampled
    it.
    """

    group: str
    stage: Stage
    context_ids: tuple[int, ...]
    completion: Completion
    reward: float
    weight: float = 1.0
    shaped: bool = False


@dataclass(frozen=True, slots=True)
class Rollout:
    """What one problem produced in one step; `refinements` is one group per Stage 2 prompt."""

    problem: Problem
    drafts: Group
    selection: Selection | None = None
    refinements: tuple[Group, ...] = ()

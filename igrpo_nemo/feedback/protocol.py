"""What a feedback decides: what Stage 2 sees, and which rows are trained under which context.

iGRPO's self-feedback is a wrapper over any group objective (paper section 5): a feedback knows
nothing of advantages or losses. Nothing outside this folder branches on a feedback's name: what
others must know, they ask of it (`two_stage`, `num_trained`, `problems`, ...).

    N drafts, scored --select--> Selection --next_prompts--> prompts, each with a target of its own
    Stage 2, scored ----------------------training_rows----> rows: context, group, weight
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from igrpo_nemo.errors import UserError
from igrpo_nemo.prompts import PromptBuilder
from igrpo_nemo.types import Group, Prompt, Rollout, Selection, Stage, Target, TrainingRow


@dataclass(frozen=True, slots=True)
class NextPrompt:
    """A prompt, how many completions to sample from it, and what these must answer.

    Without a `target` that is the problem's answer.
    """

    prompt: Prompt
    num_samples: int
    target: Target | None = None


class Feedback(Protocol):
    """The decisions between the stages; pure functions of their arguments, and of a `memory`
    where a feedback has an attribute of that name (`memory_of`)."""

    @classmethod
    def of(cls, igrpo: Any, seed: int) -> Self:
        """The feedback that the config section `igrpo` describes, with the run's seed."""
        ...

    @property
    def two_stage(self) -> bool:
        """Whether there is a Stage 2 at all."""
        ...

    @property
    def num_drafts(self) -> int:
        """Completions of the bare prompt q per problem (N; the whole budget for `none`)."""
        ...

    @property
    def num_refinements(self) -> int:
        """Completions of all Stage 2 prompts per problem, at most (G; 0 for `none`)."""
        ...

    @property
    def num_prompts(self) -> int:
        """Stage 2 prompts per problem, at most (0 for `none`)."""
        ...

    @property
    def trains_drafts(self) -> bool:
        """Whether the completions of q are among the trained rows."""
        ...

    @property
    def repeats_question(self) -> bool:
        """Whether a Stage 2 prompt may be q itself."""
        ...

    @property
    def num_trained(self) -> int:
        """Trained rows per problem, at most: `grpo.num_generations_per_prompt`."""
        ...

    def problems(self) -> Iterator[str]:
        """One line for each contradiction in its keys, which says what to change."""
        ...

    def select(self, drafts: Group, step: int) -> Selection | None:
        """Chooses among the scored drafts (Eq. 2); None where the feedback has no second stage.

        `step` numbers the training step, so that seeded choices differ between steps and are
        the same after a resume.
        """
        ...

    def next_prompts(
        self, drafts: Group, selection: Selection | None, prompts: PromptBuilder
    ) -> tuple[NextPrompt, ...]:
        """The Stage 2 prompts of one problem (Eq. 3); empty where there is no Stage 2.

        Those that show a draft stand in the order of `selection.shown`.
        """
        ...

    def training_rows(self, rollout: Rollout) -> list[TrainingRow]:
        """The rows that the objective sees, grouped by the context they share."""
        ...


class Memory(Protocol):
    """What a feedback keeps of finished steps: it changes between two steps alone, and is saved
    with them. NeMo-RL has no place for it (docs/method.md)."""

    off: str
    """The override that does without."""

    def add(self, rollouts: Sequence[Rollout], step: int) -> None:
        """Takes what step `step` sampled."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, texts, lists and mappings, for a checkpoint."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def memory_of(feedback: Feedback) -> Memory | None:
    """The memory of a feedback that has one."""
    return getattr(feedback, "memory", None)


def rows_of_group(group: Group, name: str) -> list[TrainingRow]:
    """All completions of one scored group as training rows under the group's own prompt."""
    return [
        TrainingRow(
            group=name,
            stage=group.stage,
            context_ids=group.prompt.token_ids,
            completion=completion,
            reward=score.reward,
        )
        for completion, score in zip(group.completions, group.scores, strict=True)
    ]


def too_small(key: str, size: int) -> Iterator[str]:
    """Says that a group of `size` rows, which `key` sets, has nothing to be relative to (Eq. 4)."""
    if size < 2:
        yield f"{key}={size}: a group needs at least 2 rows: with one its advantage is always 0"


def group_name(problem_id: str, stage: Stage, index: int = 0) -> str:
    """The name under which rows of one prompt share a baseline."""
    return f"{problem_id}/{stage}/{index}"


class Options(BaseModel):
    """Options of a feedback: the fields of a subclass are the keys of `igrpo.feedback_options`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


OptionsT = TypeVar("OptionsT", bound=Options)


def read_options(kind: type[OptionsT], igrpo: Any) -> OptionsT:
    """`igrpo.feedback_options` as `kind`; `UserError` for an unknown key or a wrong value."""
    try:
        return kind.model_validate(igrpo.feedback_options)
    except ValidationError as error:
        wrong = error.errors()[0]
    key = f"igrpo.feedback_options.{'.'.join(map(str, wrong['loc']))}"
    if wrong["type"] == "extra_forbidden":
        known = ", ".join(kind.model_fields) or "no options"
        raise UserError(f"unknown key {key}: feedback {igrpo.feedback} has {known}")
    message = wrong["msg"].removeprefix("Value error, ").removeprefix("Input ")
    raise UserError(f"{key}={wrong['input']!r} {message}")


def other_stages(name: str, stages: tuple[str, ...], *trained: Stage) -> Iterator[str]:
    """Says where feedback `name`, which trains the stages `trained`, was told to train others."""
    if sorted(stages) != sorted(trained):
        wanted = ", ".join(trained)
        yield (
            f"igrpo.train_stages=[{', '.join(stages)}], but feedback {name} trains [{wanted}]: "
            f"set igrpo.train_stages=[{wanted}]"
        )

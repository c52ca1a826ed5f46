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
from typing import Any, ClassVar, Protocol, Self

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


class Options(BaseModel):
    """Options of a feedback: the fields of a subclass are the keys of `igrpo.feedback_options`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


@dataclass(frozen=True)
class Feedback:
    """The decisions between the stages; pure functions of their arguments, and of a `memory`
    where a feedback has an attribute of that name (`memory_of`).

    One of the user's own need not inherit from it, only have what is here. Two methods have no
    default: `select` and `next_prompts`.
    """

    num_drafts: int
    """Completions of the bare prompt q per problem (N; the whole budget for `none`)."""
    num_refinements: int
    """Completions of all Stage 2 prompts per problem, at most (G; 0 for `none`)."""
    seed: int = 0
    train_stages: tuple[str, ...] | None = None
    """`igrpo.train_stages`; None is what the feedback trains."""
    options: Any = None
    """Of the class that `Options` names."""

    Options: ClassVar[type[Options]] = Options
    trained: ClassVar[tuple[Stage, ...]] = (Stage.REFINE,)
    """The stages whose rows it trains."""
    two_stage: ClassVar[bool] = True
    """Whether there is a Stage 2 at all."""
    num_prompts = 1
    """Stage 2 prompts per problem, at most (0 for `none`)."""
    repeats_question = False
    """Whether a Stage 2 prompt may be q itself."""

    def __post_init__(self) -> None:
        if self.train_stages is None:
            object.__setattr__(self, "train_stages", self.trained)
        if self.options is None:
            object.__setattr__(self, "options", self.Options())

    @classmethod
    def of(cls, igrpo: Any, seed: int) -> Self:
        """The feedback that the config section `igrpo` describes, with the run's seed."""
        options = read_options(cls.Options, igrpo)
        stages = tuple(igrpo.train_stages)
        return cls(igrpo.num_drafts, igrpo.num_refinements, seed, stages, options)

    @property
    def trains_drafts(self) -> bool:
        """Whether the completions of q are among the trained rows."""
        return Stage.DRAFT in self.trained

    @property
    def num_trained(self) -> int:
        """Trained rows per problem, at most: `grpo.num_generations_per_prompt`."""
        drafts = self.num_drafts if self.trains_drafts else 0
        return drafts + (self.num_refinements if Stage.REFINE in self.trained else 0)

    def problems(self) -> Iterator[str]:
        """One line for each contradiction in its keys, which says what to change."""
        stages = self.train_stages or ()
        if sorted(stages) != sorted(self.trained):
            wanted = ", ".join(self.trained)
            yield (
                f"igrpo.train_stages=[{', '.join(stages)}], but this feedback trains [{wanted}]: "
                f"set igrpo.train_stages=[{wanted}]"
            )
        if self.trains_drafts:
            yield from too_small("igrpo.num_drafts", self.num_drafts)
        if Stage.REFINE in self.trained:
            yield from too_small("igrpo.num_refinements", self.num_refinements)

    def select(self, drafts: Group, step: int) -> Selection | None:
        """Chooses among the scored drafts (Eq. 2); None where the feedback has no second stage.

        `step` numbers the training step, so that seeded choices differ between steps and are
        the same after a resume.
        """
        raise NotImplementedError

    def next_prompts(
        self, drafts: Group, selection: Selection | None, prompts: PromptBuilder
    ) -> tuple[NextPrompt, ...]:
        """The Stage 2 prompts of one problem (Eq. 3); empty where there is no Stage 2.

        Those that show a draft stand in the order of `selection.shown`.
        """
        raise NotImplementedError

    def training_rows(self, rollout: Rollout) -> list[TrainingRow]:
        """The rows that the objective sees, grouped by the context they share."""
        rows: list[TrainingRow] = []
        if self.trains_drafts:
            rows += rows_of_group(rollout.drafts, group_name(rollout.problem.id, Stage.DRAFT))
        if Stage.REFINE in self.trained:
            for i, group in enumerate(rollout.refinements):
                rows += rows_of_group(group, group_name(rollout.problem.id, Stage.REFINE, i))
        return rows


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
    context = group.prompt.token_ids
    return [
        TrainingRow(name, group.stage, context, completion, score.reward)
        for completion, score in zip(group.completions, group.scores, strict=True)
    ]


def too_small(key: str, size: int) -> Iterator[str]:
    """Says that a group of `size` rows, which `key` sets, has nothing to be relative to (Eq. 4)."""
    if size < 2:
        yield f"{key}={size}: a group needs at least 2 rows: with one its advantage is always 0"


def group_name(problem_id: str, stage: Stage, index: int = 0) -> str:
    """The name under which rows of one prompt share a baseline."""
    return f"{problem_id}/{stage}/{index}"


def read_options(kind: type[Options], igrpo: Any) -> Options:
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

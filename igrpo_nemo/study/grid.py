"""What a study runs: arms x tasks x seeds, each cell one training run (configs/study/*.yaml).

Study --cells--> Cell: task, arm, seed, the overrides of its run, its folder
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from igrpo_nemo.config.compose import builtin_config_dir
from igrpo_nemo.errors import UserError
from igrpo_nemo.run.folder import FINISHED

Overrides = tuple[str, ...]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Arm(_Strict):
    """One way of training. `tasks` limits it to some of the study's; None means all."""

    label: str
    overrides: Overrides
    tasks: tuple[str, ...] | None = None


class Claim(_Strict):
    """A statement of a paper: `measure` of `arm` against that of `against`, on every task.

    `better` has a higher value, `worse` a lower one, `alike` one that differs by
    less than 3 points (`outcome.ALIKE`).
    """

    says: str
    source: str
    arm: str
    against: str
    expects: Literal["better", "worse", "alike"] = "better"
    measure: Literal["accuracy", "entropy"] = "accuracy"


class Study(_Strict):
    """A grid of runs and what is asked of it. `reference` is the arm that others are paired with.

    `overrides` hold for every run; a task's and then an arm's come after them.
    """

    title: str
    about: str
    overrides: Overrides
    tasks: Mapping[str, Overrides]
    arms: Mapping[str, Arm]
    reference: str
    seeds: Annotated[int, Field(ge=1)]
    claims: tuple[Claim, ...] = ()

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        named = [self.reference, *(n for c in self.claims for n in (c.arm, c.against))]
        for name in named:
            if name not in self.arms:
                raise ValueError(f"there is no arm {name}")
        for name in (task for arm in self.arms.values() for task in arm.tasks or ()):
            if name not in self.tasks:
                raise ValueError(f"there is no task {name}")
        return self

    def restricted(self, arms: str | None, tasks: str | None, seeds: int | None) -> Study:
        """The study with some of its arms (the reference is always among them) and tasks alone.

        Raises `UserError` for a name that it does not have.
        """
        chosen_arms = _chosen("arm", arms, self.arms)
        chosen_tasks = _chosen("task", tasks, self.tasks)
        kept = {n: a for n, a in self.arms.items() if n in {*chosen_arms, self.reference}}
        return self.model_copy(
            update={
                "arms": kept,
                "tasks": {n: self.tasks[n] for n in chosen_tasks},
                "seeds": seeds or self.seeds,
                "claims": tuple(c for c in self.claims if {c.arm, c.against} <= kept.keys()),
            }
        )

    def with_overrides(self, words: Sequence[str]) -> Study:
        """The study with further overrides for every run; they come last."""
        arms = {
            name: arm.model_copy(update={"overrides": (*arm.overrides, *words)})
            for name, arm in self.arms.items()
        }
        return self.model_copy(update={"arms": arms})

    def cells(self, folder: Path) -> Iterator[Cell]:
        """All runs, seed after seed, so that a study that was stopped has every arm."""
        for seed in range(self.seeds):
            for task, of_task in self.tasks.items():
                for name, arm in self.arms.items():
                    if arm.tasks is None or task in arm.tasks:
                        words = (*self.overrides, *of_task, *arm.overrides, f"grpo.seed={seed}")
                        yield Cell(task, name, seed, words, folder / task / name / f"seed_{seed}")


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a study."""

    task: str
    arm: str
    seed: int
    overrides: Overrides
    folder: Path

    @property
    def is_finished(self) -> bool:
        """Whether the run has had all its steps; one that was stopped has a summary too."""
        return (self.folder / FINISHED).is_file()


def load_study(name: str) -> Study:
    """A study by its name in `configs/study`, or by the path of a YAML file.

    Raises `UserError` for one that is not there or does not hold what a study has.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _folder() / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"there is no study {name}: use {', '.join(names())}, or a YAML file")
    try:
        return Study.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(map(str, wrong["loc"]))
        message = wrong["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {f'{where}: ' if where else ''}{message}") from error


def names() -> list[str]:
    """The studies that come with the project."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def _folder() -> Path:
    return builtin_config_dir() / "study"


def _chosen(what: str, words: str | None, known: Mapping[str, object]) -> list[str]:
    chosen = list(known) if words is None else words.split(",")
    if unknown := [name for name in chosen if name not in known]:
        raise UserError(f"unknown {what} {unknown[0]}: use {', '.join(known)}")
    return chosen

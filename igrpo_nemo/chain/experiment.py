"""One experiment on its way from a config to a comparison: what it is, where everything lies, and
the stamps that say what a finished stage was made from.

RUN/                        the run folder (logger.log_dir)
RUN/stages/                 stamps and batch scripts of the stages
RUN/hf/WHICH                the trained model as a Hugging Face folder
RUN/evaluation/WHICH/...    evaluations, a folder a setting
RUN/comparison/             comparison.md, comparison.csv, report.html
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from igrpo_nemo.config import Config
from igrpo_nemo.errors import UserError
from igrpo_nemo.files.atomic import write_or_refuse
from igrpo_nemo.files.scrub import flat, scrub
from igrpo_nemo.run.identity import FREE_KEYS

LENGTH = ("grpo.max_num_steps", "grpo.max_num_epochs")
"""A run may be made longer; everything else that shapes it stays."""


SAMPLES = 4


def model_folder(run: Path, which: str) -> Path:
    """Where the Hugging Face folder of a run's checkpoint stands."""
    return run / "hf" / which


@dataclass(frozen=True, slots=True)
class Experiment:
    """What the command line of a chain says. `words` are its overrides, `config` is what they
    compose to, `run` the run's folder."""

    words: tuple[str, ...]
    config: Config
    run: Path
    which: str = "last"
    """The checkpoint that is evaluated: last, best, or the number of a step."""

    evaluator: str = "auto"
    """nemo_skills, igrpo (`igrpo evaluate`), or auto: NeMo-Skills where it is found."""
    benchmarks: str | None = None
    """NAME[:K],... in the place of those of the config."""
    data_dir: Path | None = None
    address: str | None = None
    """An OpenAI-compatible server of the model; without one a small model is served here, a large
    one by vLLM or by the jobs."""
    server_args: str = ""
    samples: int = SAMPLES
    """Samples a problem where the benchmark is the run's own held-out problems."""

    against: Sequence[str] = ()
    """`[LABEL=]FOLDER` of the systems to compare with, the reference first."""
    anyway: bool = False
    """Compares evaluations of other settings too."""

    checkout: Path = Path()
    continuations: int = 1
    """Jobs of the training on Slurm; a single one requeues itself."""
    skills_profile: str | None = None
    config_dir: Path | None = None
    jobs: int = 8
    """Among how many jobs the samples of an evaluation are shared."""

    @property
    def name(self) -> str | None:
        """The experiment's name in configs/, where the words choose one."""
        chosen = [word.lstrip("+") for word in self.words]
        names = [w.partition("=")[2] for w in chosen if w.startswith("experiment=")]
        return names[-1].strip("'\"") if names else None

    @property
    def label(self) -> str:
        """The system's name in tables."""
        return self.name or self.run.name

    @property
    def model(self) -> Path:
        return model_folder(self.run, self.which)

    @property
    def evaluations(self) -> Path:
        """The folder of this checkpoint's evaluations."""
        return self.run / "evaluation" / self.which

    @property
    def comparison(self) -> Path:
        return self.run / "comparison"

    def weights(self) -> str:
        """What tells the weights apart before they exist: a hash of all that they are made from."""
        inputs = {**training_inputs(self.config), "checkpoint": self.which}
        text = json.dumps(inputs, sort_keys=True, default=str)
        return f"trained-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def training_inputs(config: Config) -> dict[str, Any]:
    """Dotted key -> value of everything in the config that shapes the trained weights."""
    return shaping(scrub(config.to_dict()))


def shaping(values: Any) -> dict[str, Any]:
    """The same of the values of a config, as config.yaml holds them."""
    return {
        key: value for key, value in flat(values) if key in LENGTH or not key.startswith(FREE_KEYS)
    }


@dataclass(frozen=True, slots=True)
class Stamp:
    """`inputs`: dotted name -> value of everything the result depends on. `outputs`: facts about
    the result, such as the step of the checkpoint, that later stages read."""

    stage: str
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any] = field(default_factory=dict)


def write_stamp(path: Path, stamp: Stamp) -> None:
    """Writes the stamp whole or not at all. Raises `UserError` where it cannot be written."""
    values = {"stage": stamp.stage, "inputs": stamp.inputs, "outputs": stamp.outputs}
    write_or_refuse(path, json.dumps(values, indent=1, sort_keys=True, default=str))


def read_stamp(path: Path) -> Stamp | None:
    """The stamp at `path`, None where there is none. Raises `UserError` for a broken one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Stamp(values["stage"], values["inputs"], values["outputs"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no stamp of a stage ({error}): remove it") from error


def reusable(path: Path, inputs: Mapping[str, Any], result: Path) -> Stamp | None:
    """The stamp of a result that is there and was made from these inputs; None: make it.

    Raises `UserError` naming the first input that changed where the result is there all the same.
    """
    stamp = read_stamp(path)
    if stamp is None or not result.exists():
        return None
    if change := first_change(stamp.inputs, inputs):
        name, before, now = change
        raise UserError(
            f"{result} was made with {name}={before!r}, now it is {now!r}: remove {result} to make "
            "it again, or choose another logger.log_dir"
        )
    return stamp


def first_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first name, in alphabetical order, whose values differ, with both; None if all agree."""
    stored = json.loads(json.dumps(dict(now), default=str))  # as it would be read back
    for name in sorted({*before, *stored}):
        if before.get(name) != stored.get(name):
            return name, before.get(name), stored.get(name)
    return None

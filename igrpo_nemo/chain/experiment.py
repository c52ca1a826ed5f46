"""One experiment on its way from a config to a comparison: what it is, and where everything lies.

RUN/                        the run folder (logger.log_dir)
RUN/stages/                 the conversion's stamp, and the batch scripts of the stages
RUN/hf/WHICH                the trained model as a Hugging Face folder
RUN/evaluation/WHICH/...    evaluations, a folder a setting
RUN/comparison/             comparison.md, comparison.csv, report.html
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igrpo_nemo.cluster.launch import is_finished
from igrpo_nemo.config import Config
from igrpo_nemo.config.section import at
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.refine import Choice, Refinement
from igrpo_nemo.files.scrub import flat, scrub
from igrpo_nemo.run.folder import stored_config
from igrpo_nemo.run.identity import FREE_KEYS, LENGTH, check_same_run

SAMPLES = 4


@dataclass(frozen=True, slots=True)
class Experiment:
    """What the command line of a chain says; the fields are the flags of `train_and_evaluate.py`.

    `words` are its overrides, `config` is what they compose to, `run` the run's folder.
    """

    words: tuple[str, ...]
    config: Config
    run: Path
    which: str = "last"
    """The checkpoint that is evaluated: last, best, or the number of a step."""
    evaluator: str = "auto"
    benchmarks: str | None = None
    data_dir: Path | None = None
    address: str | None = None
    server_args: str = ""
    samples: int = SAMPLES
    """Samples a problem where the benchmark is the run's own held-out problems."""
    refine: int | None = None
    choose: Choice = "reward"
    against: Sequence[str] = ()
    anyway: bool = False
    checkout: Path = Path()
    continuations: int = 1
    """Jobs of the training on Slurm; a single one requeues itself."""
    skills_profile: str | None = None
    config_dir: Path | None = None
    jobs: int = 8

    @property
    def name(self) -> str | None:
        """The experiment's name in configs/, where the words choose one."""
        chosen = [word.lstrip("+") for word in self.words]
        names = [w.partition("=")[2] for w in chosen if w.startswith("experiment=")]
        return names[-1].strip("'\"") if names else None

    @property
    def label(self) -> str:
        return self.name or self.run.name

    @property
    def model(self) -> Path:
        return model_folder(self.run, self.which)

    @property
    def evaluations(self) -> Path:
        """The folder of this checkpoint's evaluations."""
        return self.run / "evaluation" / self.which

    @property
    def refinement(self) -> Refinement | None:
        return Refinement.of(self.refine, self.choose)

    @property
    def comparison(self) -> Path:
        return self.run / "comparison"

    def weights(self) -> str:
        """What tells the weights apart before they exist: a hash of all that they are made from."""
        inputs = {**training_inputs(self.config.to_dict()), "checkpoint": self.which}
        text = json.dumps(inputs, sort_keys=True, default=str)
        return f"trained-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def model_folder(run: Path, which: str) -> Path:
    """Where the Hugging Face folder of a run's checkpoint stands."""
    return run / "hf" / which


def training_inputs(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of everything in a config's values that shapes the trained weights."""
    values = flat(scrub(config))
    return {k: v for k, v in values if k in LENGTH or not k.startswith(FREE_KEYS)}


def is_trained(config: Config) -> bool:
    """Whether the run is finished with these settings.

    Raises `UserError` naming the first setting that is another one than the run's: for a shorter
    run too, whose weights this folder no longer has.
    """
    run, now = Path(config.logger.log_dir), config.to_dict()
    if not (before := stored_config(run)):
        return False
    check_same_run(run, now)
    for key in LENGTH:
        old, new = at(before, key), at(now, key)
        if isinstance(old, int) and isinstance(new, int) and new < old:
            raise UserError(
                f"{run} holds a run with {key}={old}, this one has {new}: choose another "
                "logger.log_dir, or remove that folder"
            )
    return is_finished(run, config)

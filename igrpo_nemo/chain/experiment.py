"""One experiment on its way from a config to a comparison: what it is and where everything lies.

RUN/                        the run folder (logger.log_dir)
RUN/stages/                 stamps and batch scripts of the stages
RUN/hf/WHICH                the trained model as a Hugging Face folder
RUN/evaluation/WHICH/...    evaluations, a folder a setting
RUN/comparison/             comparison.md, comparison.csv, report.html
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from igrpo_nemo.chain.conversion import model_folder
from igrpo_nemo.chain.training import training_inputs
from igrpo_nemo.config import Config


@dataclass(frozen=True, slots=True)
class Chain:
    """`words` are the command line's overrides, `config` is what they compose to. `which`
    checkpoint of `run` is evaluated: last, best, or the number of a step."""

    words: tuple[str, ...]
    config: Config
    run: Path
    which: str = "last"

    @property
    def experiment(self) -> str | None:
        """The experiment's name, where the words choose one."""
        chosen = [word.lstrip("+") for word in self.words]
        names = [w.partition("=")[2] for w in chosen if w.startswith("experiment=")]
        return names[-1].strip("'\"") if names else None

    @property
    def label(self) -> str:
        """The system's name in tables."""
        return self.experiment or self.run.name

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


def chain_of(words: Sequence[str], config: Config, base: Path, which: str = "last") -> Chain:
    """The chain of a composed config; a relative run folder is below `base`."""
    return Chain(tuple(words), config, base / config.logger.log_dir, which)

"""`igrpo evaluate`: k single-shot samples a problem, and refined ones; pass@1, pass@k, majority@k.

The prompt must be the one that the model was trained with. A checkpoint of a run carries it: the
run's own `config.yaml` is used, with the overrides on top. Any other model is described by
overrides alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from igrpo_nemo.cli.command import REFINE, Command, at_least

EXAMPLES = """\
  igrpo evaluate --model runs/demo/checkpoints/step_00000060 --samples 8
  igrpo evaluate --model PATH --data problems.jsonl --samples 64 --out results prompt=paper
  igrpo evaluate --model runs/demo/checkpoints/step_00000060 --samples 8 --refine 4
"""


FLAGS = {
    "--model": {"type": Path, "required": True, "metavar": "PATH", "help": "folder or checkpoint"},
    "--data": {"metavar": "NAME_OR_FILE", "help": "problems (default: the config's validation)"},
    "--samples": {
        "type": at_least(1),
        "default": 1,
        "metavar": "K",
        "help": "answers a problem (1)",
    },
    "--temperature": {"type": float, "default": 0.6, "help": "0 is greedy (0.6)"},
    "--top-p": {"type": float, "default": 0.95, "help": "share of the probability mass (0.95)"},
    "--max-tokens": {"type": at_least(1), "help": "tokens of an answer (as trained)"},
    "--limit": {"type": at_least(1), "metavar": "N", "help": "the first N problems alone"},
    "--seed": {"type": int, "default": 0, "help": "seed of the samples (0)"},
    **REFINE,
    "--out": {"type": Path, "metavar": "DIR", "help": "where samples and metrics.json go"},
}


def run(flags: argparse.Namespace, overrides: Sequence[str]) -> int:
    from igrpo_nemo.api import evaluate

    names = [name[2:].replace("-", "_") for name in FLAGS]
    settings = {name: getattr(flags, name) for name in names}
    print(evaluate(settings.pop("model"), overrides, **settings))
    return 0


COMMAND = Command(
    name="evaluate",
    help="sample answers of a model and measure their accuracy",
    words="[key=value ...]",
    run=run,
    flags=FLAGS,
    examples=EXAMPLES,
)

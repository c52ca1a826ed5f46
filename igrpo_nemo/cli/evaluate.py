"""`igrpo evaluate`: k single-shot samples a problem; pass@1, pass@k and majority@k.

The prompt must be the one that the model was trained with. A checkpoint of a run carries it: the
run's own `config.yaml` is used, with the overrides on top. Any other model is described by
overrides alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from igrpo_nemo.cli.command import Command, at_least

EXAMPLES = """\
  igrpo evaluate --model runs/demo/checkpoints/step_00000100 --samples 8
  igrpo evaluate --model PATH --data problems.jsonl --samples 64 --out results prompt=paper
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="PATH", help="model folder or checkpoint")
    add("--data", metavar="NAME_OR_FILE", help="problems (default: the config's data.validation)")
    add("--samples", type=at_least(1), default=1, metavar="K", help="samples a problem (1)")
    add("--temperature", type=float, default=0.6, help="sampling temperature; 0 is greedy (0.6)")
    add("--top-p", type=float, default=0.95, help="share of the probability mass (0.95)")
    add("--max-tokens", type=at_least(1), help="tokens of an answer at most (default: as trained)")
    add("--limit", type=at_least(1), metavar="N", help="the first N problems alone")
    add("--seed", type=int, default=0, help="seed of the samples (0)")
    add("--out", type=Path, metavar="DIR", help="where samples and metrics.json are written")


def run(flags: argparse.Namespace, overrides: Sequence[str]) -> int:
    from igrpo_nemo.api import evaluate

    evaluation = evaluate(
        flags.model,
        overrides,
        samples=flags.samples,
        temperature=flags.temperature,
        top_p=flags.top_p,
        max_tokens=flags.max_tokens,
        data=flags.data,
        out=flags.out,
        limit=flags.limit,
        seed=flags.seed,
    )
    print(evaluation)
    return 0


COMMAND = Command(
    name="evaluate",
    help="sample answers of a model and measure their accuracy",
    usage="--model PATH [flags] [key=value ...]",
    examples=EXAMPLES,
    add_flags=add_flags,
    run=run,
)

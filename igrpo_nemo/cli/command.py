"""What a subcommand is."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: its flags, each with argparse's options, and what it does.

    `run(flags, words)` returns the exit code. `words` are what stands on the command line beside
    the flags, in any order with them: Hydra overrides, files, folders; the attribute `words` shows
    them in the usage. Unknown flags are an error unless `passes_flags(flags)` says that they are
    another program's; then they are words too.
    """

    name: str
    help: str
    words: str
    run: Callable[[argparse.Namespace, Sequence[str]], int]
    flags: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    examples: str = ""
    passes_flags: Callable[[argparse.Namespace], bool] = lambda flags: False

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        for name, options in self.flags.items():
            parser.add_argument(name, **options)


def at_least(least: int, most: int | None = None) -> Callable[[str], int]:
    """The `type` of a flag that is a whole number, `least` or more, and `most` at most."""

    def number(text: str) -> int:
        value = int(text)
        if most is not None and not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value

    return number


chain_length = at_least(1, 100)
"""The `type` of `--chain`: jobs in a row."""


def switch(meaning: str) -> dict[str, Any]:
    return {"action": "store_true", "help": meaning}


REFINE = {
    "--refine": {
        "type": at_least(1),
        "metavar": "N",
        "help": "refined answers too, from the best of N drafts",
    },
    "--choose": {
        "choices": ["reward", "majority"],
        "default": "reward",
        "help": "the draft by reward, or by a vote that looks at no gold (reward)",
    },
}

EVALUATION = {
    "--benchmarks": {"metavar": "NAME[:K],...", "help": "these alone, K samples a problem"},
    "--data-dir": {"type": Path, "metavar": "DIR", "help": "prepared data (data/eval)"},
    **REFINE,
    "--address": {"metavar": "URL", "help": "an OpenAI-compatible server, up to /v1"},
    "--server-args": {"default": "", "help": "further arguments of a server that is started"},
    "--config-dir": {
        "type": Path,
        "metavar": "DIR",
        "help": "NeMo-Skills' cluster profiles (configs/cluster_configs)",
    },
    "--jobs": {"type": at_least(1), "default": 8, "help": "jobs that share the samples (8)"},
}
"""What `ns eval` is asked for, in the scripts of pipelines/."""

CONFIG_DIR = {
    "--config-dir": {
        "type": Path,
        "metavar": "DIR",
        "help": "a folder with more config groups, such as DIR/experiment/mine.yaml",
    }
}

"""What a subcommand is."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: its flags and what it does.

    `run(flags, words)` returns the exit code. `words` are what stands on the command line beside
    the flags, in any order with them: Hydra overrides, files, folders. Unknown flags are an error
    unless `passes_flags(flags)` says that they are another program's; then they are words too.
    """

    name: str
    help: str
    usage: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Sequence[str]], int]
    examples: str = ""
    passes_flags: Callable[[argparse.Namespace], bool] = lambda flags: False


def at_least(least: int) -> Callable[[str], int]:
    """The `type` of a flag that is a whole number, `least` or more."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value

    return number

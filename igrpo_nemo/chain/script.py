"""The frame of a script in `pipelines/`: arguments in, an exit code out, errors as one line."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from igrpo_nemo.chain.child import handling
from igrpo_nemo.errors import UserError

DONE, NO, BAD_INPUT, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130
"""Exit codes: done; a check said no; bad input; stopped with its state saved; Ctrl-C."""


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are `UserError`s, with the script's docstring as its help."""

    def __init__(self, doc: str | None, usage: str) -> None:
        super().__init__(
            description=doc,
            usage=f"python pipelines/{usage}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help shows what works")


def exit_code(main: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Runs `main` on the command line and returns its code; a `UserError` becomes one line.

    SIGTERM and SIGUSR1 unwind it as Ctrl-C does: what was started is ended before this process is.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with handling({signal.SIGTERM: _exit, signal.SIGUSR1: _exit}):
            return main(words)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def overrides_of(words: Sequence[str]) -> list[str]:
    """The words that are no flags, as Hydra overrides. Raises `UserError` for an unknown flag."""
    for word in words:
        if word.startswith("-"):
            raise UserError(f"unknown flag {word.partition('=')[0]}; --help shows what works")
        if "=" not in word and not word.startswith("~"):
            raise UserError(f"cannot read the override {word!r}: write key=value")
    return list(words)

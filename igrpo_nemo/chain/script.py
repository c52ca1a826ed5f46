"""The frame of a script in `pipelines/`: arguments in, an exit code out, errors as one line; and
the commands that it runs to their own end.

A request to stop is the child's to fulfil, not ours:
Ctrl-C          the terminal tells parent and child; the parent goes on waiting
SIGTERM, USR1   told to the parent alone; it passes them on and goes on waiting
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from igrpo_nemo.errors import UserError
from igrpo_nemo.run.stop import EXIT_INTERRUPTED, handling

DONE, NO, STOPPED, INTERRUPTED = 0, 1, EXIT_INTERRUPTED, 130
"""Exit codes: done; a check said no; stopped with its state saved; Ctrl-C. An error has its own."""

IGRPO = (sys.executable, "-c", "from igrpo_nemo.cli import main; raise SystemExit(main())")
"""The command `igrpo` of this interpreter, wherever it is installed."""


class ScriptParser(argparse.ArgumentParser):
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
        return error.exit_code
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


def run_to_its_end(
    command: Sequence[str], *, cwd: Path | None = None, environ: Mapping[str, str] | None = None
) -> int:
    """The exit code of a command, 128 + N where signal N ended it. It has as long as it takes to
    save what it has: `subprocess.run` would kill it a quarter of a second after Ctrl-C."""
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if child is None:
            early.append(number)
        else:
            child.send_signal(number)

    def wait_on(number: int, frame: FrameType | None) -> None:
        if child is None:
            # The terminal may not have reached a child yet; a second SIGINT would stop it unsaved.
            early.append(signal.SIGTERM)

    # Handlers, not SIG_IGN: a child inherits what is ignored, but not what is handled.
    handlers = {signal.SIGINT: wait_on, signal.SIGTERM: pass_on, signal.SIGUSR1: pass_on}
    with handling(handlers):
        child = subprocess.Popen(list(command), stdin=subprocess.DEVNULL, cwd=cwd, env=environ)
        for number in early:
            child.send_signal(number)
        code = child.wait()
    return code if code >= 0 else 128 - code

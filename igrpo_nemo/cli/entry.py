"""Entry point: parses the command line, runs a subcommand, and turns errors into exit codes."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from igrpo_nemo import __version__
from igrpo_nemo.cli import (
    data,
    evaluate,
    keys,
    launch,
    runs,
    score,
    study,
    train,
)
from igrpo_nemo.cli.command import Command, switch
from igrpo_nemo.errors import UserError

COMMANDS: tuple[Command, ...] = (
    train.TRAIN,
    train.PREFLIGHT,
    launch.COMMAND,
    runs.STATUS,
    evaluate.COMMAND,
    score.COMMAND,
    data.COMMAND,
    runs.REPORT,
    study.COMMAND,
    runs.EXPORT,
    keys.COMMAND,
)

EXIT_FAILURE = 1
EXIT_SIGINT = 130
EXIT_PIPE = 141

EPILOG = """\
examples:
  igrpo train experiment=demo                      train a small model with iGRPO
  igrpo report runs/demo                           one HTML page about that run
  igrpo train policy.model_name=PATH objective=dapo grpo.seed=1 --dry-run

key=value overrides are Hydra's; `igrpo keys` lists every key with its meaning.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (the process's own by default) and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return _run(arguments)
        except SystemExit as stop:  # argparse, after --help and --version
            return stop.code if isinstance(stop.code, int) else 0
        except UserError as error:
            return _fail(arguments, error, str(error), error.exit_code)
        except KeyboardInterrupt as error:
            return _fail(arguments, error, "interrupted", EXIT_SIGINT)
        except BrokenPipeError:
            # The reader of our output went away; Python must not complain at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_PIPE
        except Exception as error:  # the last boundary: one line instead of a traceback
            what = f"{type(error).__name__}: {_one_line(error)}"
            code = getattr(error, "exit_code", EXIT_FAILURE)
            return _fail(arguments, error, f"{what} (--traceback shows where)", code)


class _Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line is a `UserError` and not a usage page."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` shows what works")


def _run(arguments: list[str]) -> int:
    parser = _parser()
    flags, rest = parser.parse_known_args(arguments)
    if flags.command is None:
        parser.print_help()
        return 0
    command = next(c for c in COMMANDS if c.name == flags.command)
    for word in rest:
        if word.startswith("-") and not command.passes_flags(flags):
            raise UserError(_unknown_flag(command, word))
    code = command.run(flags, rest)
    sys.stdout.flush()
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="igrpo",
        usage="igrpo [-h] [--version] COMMAND ...",
        description="iGRPO: two-stage, self-feedback GRPO for LLM reasoning.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"igrpo-nemo {__version__}")
    parser.add_argument("--traceback", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(command=None)
    # argparse counts a command's indent too low: a name longer than the heading would be wrapped.
    subparsers = parser.add_subparsers(
        title="commands", metavar="COMMAND ...", parser_class=_Parser, prog="igrpo"
    )
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name,
            help=command.help,
            description=command.help,
            usage=f"igrpo {command.name} [flags] {command.words}",
            epilog=f"examples:\n{command.examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        subparser.add_argument("--traceback", **switch("show the traceback of an error"))
        command.add_flags(subparser)
        subparser.set_defaults(command=command.name)
    return parser


def _unknown_flag(command: Command, word: str) -> str:
    flag = word.partition("=")[0]
    known = [*command.flags, "--help", "--traceback"]
    near = difflib.get_close_matches(flag, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"`igrpo {command.name} --help` lists the flags"
    return f"unknown flag {flag}: {hint}"


def _fail(arguments: list[str], error: BaseException, message: str, code: int) -> int:
    if "--traceback" in arguments:
        traceback.print_exception(error)
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)

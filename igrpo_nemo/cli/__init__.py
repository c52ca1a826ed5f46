"""The command `igrpo`: subcommands with Hydra overrides behind them.

    igrpo COMMAND [flags] [key=value ...] --> command.run --> exit code

Each subcommand is a `Command` of a module of this package; `entry` lists them. Nothing
heavy is imported before a command runs, and torch not before one needs it.
Exit codes: 0 done, 2 bad input (one line on stderr), 75 stopped by a signal with the state saved,
130 interrupted, 1 anything else.
"""

from igrpo_nemo.cli.entry import main

__all__ = ["main"]

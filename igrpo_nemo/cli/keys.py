"""`igrpo keys`: every config key with its meaning."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from igrpo_nemo.cli.command import Command
from igrpo_nemo.errors import UserError

EXAMPLES = """\
  igrpo keys
  igrpo keys igrpo grpo.reward_shaping
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """No flags of its own."""


def run(flags: argparse.Namespace, prefixes: Sequence[str]) -> int:
    from igrpo_nemo.config.keys import all_keys, nearest_key

    keys = list(all_keys())
    for prefix in prefixes:
        if not any(_below(key.path, prefix) for key in keys):
            near = nearest_key(prefix)
            hint = f": did you mean {near}?" if near else ": `igrpo keys` lists all"
            raise UserError(f"there is no key {prefix}{hint}")
    shown = [k for k in keys if not prefixes or any(_below(k.path, p) for p in prefixes)]
    width = min(max(len(key.path) for key in shown), 52)
    for key in shown:
        print(f"{key.path:<{width}}  {key.description}")
    return 0


def _below(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(f"{prefix}.")


COMMAND = Command(
    name="keys",
    help="list config keys with their meaning",
    usage="[PREFIX ...]",
    examples=EXAMPLES,
    add_flags=add_flags,
    run=run,
)

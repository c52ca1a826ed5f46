"""`igrpo keys`: every config key with its meaning, the words it takes, and its default."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from igrpo_nemo.cli.command import Command
from igrpo_nemo.errors import UserError

if TYPE_CHECKING:
    from igrpo_nemo.config.schema import Key

EXAMPLES = """\
  igrpo keys
  igrpo keys igrpo grpo.reward_shaping

A default is what `igrpo train` has without any override: of configs/, else of the code. Other
choices of a group, such as engine=nemo_rl, have their own: `igrpo train ... --dry-run` shows them.
"""

NO_MODEL = "no model"
"""Stands for the one value that has no default, to leave out what is made of it."""
SHOWN_CHARACTERS = 60
"""A longer default is a prompt or a table: --dry-run has it."""


def run(flags: argparse.Namespace, prefixes: Sequence[str]) -> int:
    from igrpo_nemo.config.schema import all_keys, nearest_key

    keys = list(all_keys())
    for prefix in prefixes:
        if not any(_below(key.path, prefix) for key in keys):
            near = nearest_key(prefix)
            hint = f": did you mean {near}?" if near else ": `igrpo keys` lists all"
            raise UserError(f"there is no key {prefix}{hint}")
    shown = [k for k in keys if not prefixes or any(_below(k.path, p) for p in prefixes)]
    width = min(max(len(key.path) for key in shown), 52)
    values = _default_values()
    for key in shown:
        print(f"{key.path:<{width}}  {key.description}{_takes(key, values)}")
    return 0


def _takes(key: Key, values: dict[str, Any]) -> str:
    """`(tail, head_tail; default tail)`; empty where neither is known."""
    default = _default_text(key, values)
    known = [", ".join(key.choices)] if key.choices else []
    known += [f"default {default}"] if default else []
    return f" ({'; '.join(known)})" if known else ""


def _default_text(key: Key, values: dict[str, Any]) -> str | None:
    *parents, leaf = key.path.split(".")
    for name in parents:
        values = values.get(name) or {}
    # A null of the schema alone says that the key is absent, which is not what null may mean.
    if key.section is not None or (leaf not in values and key.default is None):
        return None
    value = values.get(leaf, key.default)
    text = value if isinstance(value, str) and value else json.dumps(value)
    shown = len(text) <= SHOWN_CHARACTERS and "\n" not in text and NO_MODEL not in text
    return text if shown else None


def _default_values() -> dict[str, Any]:
    """What configs/ compose to without overrides."""
    from igrpo_nemo.config.compose import composed_values, config_folders

    return composed_values([f"policy.model_name='{NO_MODEL}'"], config_folders())


def _below(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(f"{prefix}.")


COMMAND = Command(
    name="keys",
    help="list config keys with meaning, allowed words and default",
    words="[PREFIX ...]",
    run=run,
    examples=EXAMPLES,
)

"""`igrpo train` and, before it, `igrpo preflight`: a config is composed, then trained, printed
(--dry-run), or measured against the machines. `igrpo keys` lists what it may hold."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igrpo_nemo.cli.command import CONFIG_DIR, Command, switch
from igrpo_nemo.errors import UserError

if TYPE_CHECKING:
    from igrpo_nemo.config import Config
    from igrpo_nemo.config.schema import Key

EXAMPLES = """\
  igrpo train experiment=demo
  igrpo train experiment=demo grpo.max_num_steps=5 logger.log_dir=runs/short
  igrpo train experiment=demo feedback=none            GRPO with the same budget
  igrpo train policy.model_name=PATH data=gsm8k objective=gspo --dry-run

A run that was stopped goes on where it was when the same command is given again.
"""


def run(flags: argparse.Namespace, overrides: Sequence[str]) -> int:
    from igrpo_nemo.api import load_config, train

    config = load_config(overrides, flags.config_dir)
    if flags.dry_run:
        print(dry_run_text(config, overrides, flags.config_dir), end="")
        return 0
    return train(config)


def dry_run_text(config: Config, overrides: Sequence[str], config_dir: Path | None = None) -> str:
    """The resolved config as YAML; behind it the files that it is made of and the rollout budget.

    All is as the run will have it where the number of problems is known without the data.
    """
    from igrpo_nemo.config import RolloutBudget, with_problems
    from igrpo_nemo.config.compose import merged_files
    from igrpo_nemo.config.schema import unread
    from igrpo_nemo.run.core import expected_problems

    problems = expected_problems(config)
    if problems is not None:
        config = with_problems(config, problems)
    known = [] if problems is None else [f"training problems: {problems:,}"]
    budget = [*known, *RolloutBudget(config, problems).lines()]
    made_of = [*merged_files(overrides, config_dir), "command line", "config/derive.py"]
    lines = ["", "made of (the later one wins)", *(f"  {each}" for each in made_of)]
    lines += ["", "rollout budget", *(f"  {line}" for line in budget)]
    if keys := unread(config):
        lines.append(f"not read by engine {config.igrpo.engine}: {', '.join(keys)}")
    return config.to_yaml() + "".join(f"# {line}".rstrip() + "\n" for line in lines)


TRAIN = Command(
    name="train",
    help="train a model with iGRPO, or GRPO",
    words="[key=value ...]",
    run=run,
    flags={
        "--dry-run": switch(
            "print the resolved config, the files that it is made of, and the budget; then stop"
        ),
        **CONFIG_DIR,
    },
    examples=EXAMPLES,
)


PREFLIGHT_EXAMPLES = """\
  igrpo preflight experiment=table1_openmath_nemotron_14b_igrpo
  igrpo preflight experiment=tableS3_igrpo igrpo.preflight.response_share=0.6 --json
  igrpo preflight model=openmath_nemotron_14b engine=nemo_rl cluster=a100_1x8

Exit code 1 says that it does not fit, with the reason and the nearest setting that does, or that
its judge cannot be used.
"""
EXIT_REFUSED = 1


def run_preflight(flags: argparse.Namespace, overrides: Sequence[str]) -> int:
    from igrpo_nemo.cluster.site import with_site
    from igrpo_nemo.config import load_config
    from igrpo_nemo.preflight import preflight
    from igrpo_nemo.rewards.judge import judge_problems

    config = load_config(overrides, flags.config_dir)
    config = with_site(config, Path.cwd(), os.environ, overrides)
    hf_home = {"HF_HOME": config.igrpo.site.hf_home} if config.igrpo.site.hf_home else {}
    plan = preflight(config, environ={**os.environ, **hf_home})
    plan.judge.extend(judge_problems(config.igrpo))
    if flags.json:
        print(json.dumps(plan.to_dict(), indent=2))
    else:
        print(plan.text(), end="")
    return EXIT_REFUSED if plan.problems or plan.judge else 0


PREFLIGHT = Command(
    name="preflight",
    help="does a run fit its machines, and what does it cost",
    words="[key=value ...]",
    run=run_preflight,
    flags={"--json": switch("print one JSON object"), **CONFIG_DIR},
    examples=PREFLIGHT_EXAMPLES,
)


KEYS_EXAMPLES = """\
  igrpo keys
  igrpo keys igrpo grpo.reward_shaping

A default is what `igrpo train` has without any override: of configs/, else of the code. Other
choices of a group, such as engine=nemo_rl, have their own: `igrpo train ... --dry-run` shows them.
"""

NO_MODEL = "no model"
"""Stands for the one value that has no default, to leave out what is made of it."""
SHOWN_CHARACTERS = 60
"""A longer default is a prompt or a table: --dry-run has it."""


def run_keys(flags: argparse.Namespace, prefixes: Sequence[str]) -> int:
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


KEYS = Command(
    name="keys",
    help="list config keys with meaning, allowed words and default",
    words="[PREFIX ...]",
    run=run_keys,
    examples=KEYS_EXAMPLES,
)

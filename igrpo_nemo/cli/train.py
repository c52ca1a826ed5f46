"""`igrpo train` and, before it, `igrpo preflight`: a config is composed, then trained, printed
(--dry-run), or measured against the machines."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from igrpo_nemo.cli.command import CONFIG_DIR, Command, switch

if TYPE_CHECKING:
    from igrpo_nemo.config import Config

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
    from igrpo_nemo.run.problems import expected_problems

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
    plan = preflight(config)
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

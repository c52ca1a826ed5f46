"""`igrpo preflight`: does a run fit its machines, and what does it cost."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from igrpo_nemo.cli.command import CONFIG_DIR, Command, switch

EXAMPLES = """\
  igrpo preflight experiment=table1_openmath_nemotron_14b_igrpo
  igrpo preflight experiment=tableS3_igrpo igrpo.preflight.response_share=0.6 --json
  igrpo preflight model=openmath_nemotron_14b engine=nemo_rl cluster=a100_1x8

Exit code 1 says that it does not fit, with the reason and the nearest setting that does, or that
its judge cannot be used.
"""

EXIT_REFUSED = 1


def run(flags: argparse.Namespace, overrides: Sequence[str]) -> int:
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


COMMAND = Command(
    name="preflight",
    help="does a run fit its machines, and what does it cost",
    words="[key=value ...]",
    run=run,
    flags={"--json": switch("print one JSON object"), **CONFIG_DIR},
    examples=EXAMPLES,
)

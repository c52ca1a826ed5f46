"""`igrpo export`: a run's model with a model card, in a folder or on the hub."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from igrpo_nemo.cli.command import Command, switch
from igrpo_nemo.errors import UserError

EXAMPLES = """\
  igrpo export runs/demo --to models/demo
  igrpo export runs/mine --to models/mine --checkpoint best
  igrpo export runs/mine --to hub:me/my-model --private        with HF_TOKEN in the environment
"""


def run(flags: argparse.Namespace, words: Sequence[str]) -> int:
    if len(words) != 1:
        raise UserError("igrpo export needs one run folder, such as runs/demo")
    from igrpo_nemo.chain.export import export

    print(export(Path(words[0]), flags.to, which=flags.checkpoint, private=flags.private))
    return 0


COMMAND = Command(
    name="export",
    help="publish the model of a run, with a model card",
    words="RUN",
    run=run,
    flags={
        "--to": {"required": True, "metavar": "FOLDER", "help": "a new folder, or hub:OWNER/NAME"},
        "--checkpoint": {"default": "last", "help": "last (default), best, or a step"},
        "--private": switch("a repository that the hub makes is private"),
    },
    examples=EXAMPLES,
)

"""`igrpo study`: a grid of arms, tasks and seeds, trained and compared."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from igrpo_nemo.cli.command import Command, at_least, switch
from igrpo_nemo.errors import UserError

if TYPE_CHECKING:
    from igrpo_nemo.study.grid import Cell

EXAMPLES = """\
  igrpo study compare                              GRPO, iGRPO, controls and baselines
  igrpo study compare --arms igrpo,critique --seeds 5 grpo.max_num_steps=50
  igrpo study claims --processes 2                 the paper's claims in miniature
  igrpo study mine.yaml --submit                   a study of cluster experiments, as Slurm jobs

A study is a YAML file: configs/study/compare.yaml shows what it holds. Finished runs are kept; the
same command goes on with the next one, and fills the page with what there is.
"""


def run(flags: argparse.Namespace, words: Sequence[str]) -> int:
    from igrpo_nemo.study.grid import load_study, names
    from igrpo_nemo.study.page import outcome, text, write
    from igrpo_nemo.study.runner import cpu_seconds, train_cells, unfinished

    if not words or "=" in words[0]:
        raise UserError(f"igrpo study needs a study: {', '.join(names())}, or a YAML file")
    name, *overrides = words
    study = load_study(name).restricted(flags.arms, flags.tasks, flags.seeds)
    folder = flags.out or Path("runs") / "study" / Path(name).stem
    cells = list(study.with_overrides(overrides).cells(folder))
    if flags.submit:
        _submit(unfinished(cells))
    else:
        train_cells(cells, flags.processes, lambda told: print(told, file=sys.stderr, flush=True))
    found = outcome(study, cells, cpu_seconds(cells))
    if not found.runs:
        print("no run has finished yet: the same command fills the page later")
        return 0
    pages = write(found, folder)
    print(json.dumps(found.to_dict()) if flags.json else text(found, pages))
    return 0


def _submit(cells: Sequence[Cell]) -> None:
    """A Slurm job for every run that has none which runs or waits."""
    from igrpo_nemo.cluster.client import my_jobs
    from igrpo_nemo.cluster.job import find_checkout, jobs_of
    from igrpo_nemo.cluster.launch import prepare_launch, submit_launch

    checkout, jobs = find_checkout(Path.cwd()), my_jobs()
    for cell in cells:
        folder = cell.folder.absolute()
        if any(job.active for job in jobs_of(folder, jobs)):
            continue
        words = [*cell.overrides, f"logger.log_dir={folder}"]
        submit_launch(prepare_launch(words, checkout, os.environ), os.environ)


COMMAND = Command(
    name="study",
    help="train arms x tasks x seeds at one budget and compare them",
    words="NAME [key=value ...]",
    run=run,
    flags={
        "--arms": {
            "metavar": "A,B",
            "help": "some of its arms (the reference always runs)",
        },
        "--tasks": {"metavar": "A,B", "help": "some of its tasks"},
        "--seeds": {"type": at_least(1), "metavar": "N", "help": "runs per arm (the study's)"},
        "--processes": {
            "type": at_least(1),
            "default": 1,
            "metavar": "N",
            "help": "runs that train at a time (1)",
        },
        "--out": {"type": Path, "metavar": "FOLDER", "help": "(runs/study/NAME)"},
        "--submit": switch("submit the missing runs to Slurm in the place of training here"),
        "--json": switch("print one JSON object"),
    },
    examples=EXAMPLES,
)

"""What `ns ... --cluster=NAME` would submit, as text. Run by NeMo-Skills' own Python, as a script.

    python sbatch_text.py eval --cluster=NAME ...       the arguments of `ns`
    -> stdout: every batch file that NeMo-Run would send, then the scripts that the jobs run

NeMo-Skills composes the jobs as for a submission; in the place of running the experiment NeMo-Run's
own dry run renders it. Nothing is sent, and nothing is left behind.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any


def print_jobs(experiment: Any, *_: object, **__: object) -> None:
    """Takes the place of `run_exp`: prints each job of the experiment."""
    experiment.dryrun(log=False, delete_exp_dir=False)
    folder = Path(experiment._exp_dir)
    for job in experiment.jobs:
        # A group of commands in one job has a list of these, a single command one.
        for info in getattr(job, "_dryrun_infos", None) or [job._dryrun_info]:
            name = info.request.executor.job_details.job_name
            text = info.request.materialize()
            print(f"##### sbatch {job.id}: {name}\n{text}", file=sys.__stdout__)
    for script in sorted(folder.rglob("scripts/*.sh")):
        text = script.read_text(encoding="utf-8")
        print(f"##### {script.relative_to(folder)}\n{text}", file=sys.__stdout__)
    shutil.rmtree(folder)


def main() -> None:
    # NeMo-Skills logs to stdout.
    sys.stdout = sys.stderr
    import nemo_skills.pipeline.utils as pipeline_utils

    pipeline_utils.run_exp = print_jobs
    from nemo_skills.pipeline.cli import app

    app(sys.argv[1:])


if __name__ == "__main__":
    main()

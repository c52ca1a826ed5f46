"""What `ns ... --cluster=NAME` would submit, as text. Run by NeMo-Skills' own Python, as a script.

    python sbatch_text.py eval --cluster=NAME ...       the arguments of `ns`
    -> stdout: every batch file that NeMo-Run would send, then the scripts that the jobs run

NeMo-Skills composes the jobs as for a submission; in the place of running the experiment NeMo-Run's
own dry run renders it. Nothing is sent. NeMo-Run writes the jobs' files before it shows them: here
into a folder that is gone afterwards, and the text names the profile's `job_dir`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any


def print_jobs(experiment: Any, scratch: str, job_dir: str) -> None:
    experiment.dryrun(log=False, delete_exp_dir=False)
    for job in experiment.jobs:
        # A group of commands in one job has a list of these, a single command one.
        for info in getattr(job, "_dryrun_infos", None) or [job._dryrun_info]:
            executor = info.request.executor
            where = Path(executor.tunnel.job_dir)
            if where.is_relative_to(scratch):  # jobs may share a tunnel
                executor.tunnel.job_dir = str(job_dir / where.relative_to(scratch))
            name, text = executor.job_details.job_name, info.request.materialize()
            print(f"##### sbatch {job.id}: {name}\n{text}", file=sys.__stdout__)
    folder = Path(experiment._exp_dir)
    for script in sorted(folder.rglob("scripts/*.sh")):
        text = script.read_text(encoding="utf-8")
        print(f"##### {script.relative_to(folder)}\n{text}", file=sys.__stdout__)


def main() -> None:
    sys.stdout = sys.stderr  # NeMo-Skills logs to stdout
    import nemo_skills.pipeline.utils as pipeline_utils  # type: ignore
    import nemo_skills.pipeline.utils.cluster as cluster  # type: ignore
    from nemo_run.config import set_nemorun_home  # type: ignore

    with tempfile.TemporaryDirectory() as scratch:
        job_dirs = [scratch]

        def choose_home(job_dir: str) -> None:
            job_dirs.append(job_dir)
            set_nemorun_home(scratch)

        cluster.set_nemorun_home = choose_home
        pipeline_utils.run_exp = lambda exp, *_, **__: print_jobs(exp, scratch, job_dirs[-1])
        from nemo_skills.pipeline.cli import app  # type: ignore

        app(sys.argv[1:])


if __name__ == "__main__":
    main()

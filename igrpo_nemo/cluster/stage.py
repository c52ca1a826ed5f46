"""The batch scripts of the short stages (convert, compare) on Slurm: one node, one command.

    StageJob + profile --script_text--> RUN/stages/NAME.sh --submit_stage--> job id

Every option stands in the file, so that it can be read, and submitted again by hand.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from igrpo_nemo.cluster.client import submit
from igrpo_nemo.cluster.job import LOGS, account_options, job_name, output_option
from igrpo_nemo.cluster.site import sbatch_environment
from igrpo_nemo.config.igrpo_keys import Site
from igrpo_nemo.errors import UserError
from igrpo_nemo.files.atomic import check_folder, write_or_refuse

HOST_PATHS = (
    "PYTHONPATH PYTHONHOME PYTHONUSERBASE VIRTUAL_ENV CONDA_PREFIX LD_LIBRARY_PATH LD_PRELOAD"
)
"""What a container must not inherit, as in slurm/lib/container.sh."""

_PLAIN = re.compile(r"[\w./+:=,@%$&|*()\[\]-]+")
_NOT_FOR_THE_JOB = {"CONTAINER_IMAGE", "CONTAINER_MOUNTS", "VENV"}


@dataclass(frozen=True, slots=True)
class StageJob:
    """A stage as a job: `command` is run in the checkout; `after` are the jobs that must succeed.

    `after` may name jobs that have no number yet, in a plan that is only printed.
    """

    stage: str
    command: tuple[str, ...]
    gpus: int
    time: str
    after: tuple[int | str, ...] = ()


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Where stage jobs run: profile, checkout, run folder (absolute), and the job's variables."""

    site: Site
    checkout: Path
    run: Path
    settings: Mapping[str, str]


def script_path(job: StageJob, where: Surroundings) -> Path:
    return where.run / "stages" / f"{job.stage}.sh"


def script_text(job: StageJob, where: Surroundings) -> str:
    """The batch script. Raises `UserError` for a value that an #SBATCH line cannot hold."""
    lines = ["#!/usr/bin/env bash", f"# Stage {job.stage} of {where.run.name}."]
    lines += [f"#SBATCH {_plain(option)}" for option in _options(job, where)]
    lines += ["set -euo pipefail", f"cd {shlex.quote(str(where.checkout))}"]
    if where.site.container:
        lines.append(f"unset {HOST_PATHS}")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in _variables(where).items()]
    if not where.site.container:
        venv = where.settings.get("VENV") or str(where.checkout / ".venv")
        lines.append(f'export PATH={shlex.quote(f"{venv}/bin")}:"$PATH"')
    lines.append(shlex.join([*_srun(where), *job.command]))
    return "\n".join(lines) + "\n"


def submit_stage(job: StageJob, where: Surroundings, environ: Mapping[str, str]) -> int:
    """Writes the script and submits it; the job id."""
    path, text = script_path(job, where), script_text(job, where)
    check_folder(where.run / LOGS, "the stages' jobs log there")
    write_or_refuse(path, text)
    return submit(["sbatch", "--parsable", str(path)], where.checkout, sbatch_environment(environ))


def _options(job: StageJob, where: Surroundings) -> Iterator[str]:
    site = where.site
    yield f"--job-name={job_name(where.run)}-{job.stage}"
    yield "--nodes=1"
    yield "--ntasks-per-node=1"
    if site.gpu != "cpu" and job.gpus:
        yield f"--gpus-per-node={job.gpus}"
        # The CPUs convert, in their memory: a site's share for one of them is too little.
        yield "--exclusive"
        yield "--mem=0"
    yield f"--time={job.time}"
    yield "--requeue"
    yield from account_options(site)
    yield output_option(where.run, f"{job.stage}-%j")
    if job.after:
        yield f"--dependency=afterok:{':'.join(str(number) for number in job.after)}"
        yield "--kill-on-invalid-dep=yes"
    yield from site.sbatch


def _variables(where: Surroundings) -> dict[str, str]:
    return {n: v for n, v in where.settings.items() if v and n not in _NOT_FOR_THE_JOB}


def _srun(where: Surroundings) -> Sequence[str]:
    """The step: in the profile's container, or on the node itself."""
    site = where.site
    # Slurm would tie a single task to a single CPU.
    step = ["srun", "--ntasks=1", "--cpu-bind=none"]
    if not site.container:
        return step
    own = (where.checkout, *run_folders(where), site.hf_home)
    there = {mount.split(":")[1] for mount in site.mounts}
    missing = [str(path) for path in own if path and str(path) not in there]
    mounts = [*site.mounts, *(f"{path}:{path}" for path in missing)]
    return [
        *step,
        f"--container-image={site.container}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={where.checkout}",
        "--no-container-mount-home",
        f"--container-env={','.join(sorted(_variables(where)))}",
        *("bash", "-c", 'PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "$@"', "bash"),
    ]


def run_folders(where: Surroundings) -> list[Path]:
    """The run's folder, and the one of its checkpoints where that lies elsewhere."""
    checkpoints = Path(where.settings["IGRPO_CHECKPOINT_DIR"])
    return [where.run] if where.run in checkpoints.parents else [where.run, checkpoints]


def _plain(option: str) -> str:
    """Slurm ends an #SBATCH line at `#`, and splits it at blanks."""
    if not _PLAIN.fullmatch(option):
        raise UserError(f"{option!r} cannot stand in a job script: use no blanks and no #")
    return option

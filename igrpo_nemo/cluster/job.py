"""The jobs of a run: where their scripts are, their names, logs and options.

RUN/slurm/<job id>.out                  what the job script prints
RUN/slurm/<job id>-<restart>/           one start: driver.log, launcher.log, head.log, ...

Submission --sbatch_command--> sbatch OPTIONS slurm/X.sh WORDS             a training, an evaluation
StageJob + profile --script_text--> RUN/stages/NAME.sh --submit_stage--> job id   convert, compare

A job is submitted from a checkout, and works in its folder. The options are those of Slurm 22.05;
in a stage's script all of them stand in the file, so that it can be submitted again by hand.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from igrpo_nemo.cluster.client import Job, submit
from igrpo_nemo.cluster.site import absolute, sbatch_environment
from igrpo_nemo.config import Config
from igrpo_nemo.config.igrpo_keys import Site, time_in_seconds
from igrpo_nemo.errors import UserError
from igrpo_nemo.files.atomic import check_folder, write_or_refuse

LOGS = "slurm"
GENERIC_SCRIPT = "slurm/train.sh"
EVALUATION_SCRIPT = "evaluate.sh"
"""The one script that trains nothing: its words are those of pipelines/evaluate.py."""
HOST_PATHS = (
    "PYTHONPATH PYTHONHOME PYTHONUSERBASE VIRTUAL_ENV CONDA_PREFIX LD_LIBRARY_PATH LD_PRELOAD"
)
"""What a container must not inherit, as in slurm/lib/container.sh."""

_START = re.compile(r"(\d+)-(\d+)")
_PLAIN = re.compile(r"[\w./+:=,@%$&|*()\[\]-]+")
_NOT_FOR_THE_STAGE = {"CONTAINER_IMAGE", "CONTAINER_MOUNTS", "VENV"}


def job_name(run_folder: Path) -> str:
    """The name that all jobs of a run share, and no other run's: `--dependency=singleton` lets
    one of a name run at a time."""
    path = str(run_folder.resolve())
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).name).strip("-")[:40]
    return f"igrpo-{base}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def log_folders(run_folder: Path) -> dict[tuple[int, int], Path]:
    """The logs of each start, by (job id, restart), in their order."""
    found = ((_START.fullmatch(entry.name), entry) for entry in (run_folder / LOGS).glob("*-*"))
    return dict(sorted(((int(m[1]), int(m[2])), entry) for m, entry in found if m))


def jobs_of(run_folder: Path, jobs: Sequence[Job]) -> list[Job]:
    """The jobs of a run, oldest first: those of its name, and those that have logged in its folder,
    since a script that was submitted by hand has a name of its own."""
    name, logged = job_name(run_folder), {job for job, _ in log_folders(run_folder)}
    own = (job for job in jobs if job.name == name or job.id in logged)
    return sorted(own, key=lambda job: job.id)


@dataclass(frozen=True, slots=True)
class Submission:
    """`script` with `words`, to be submitted in `checkout`; the config has the cluster profile.

    An evaluation does not train: it is no run, several may go on at once, and its shape and name
    are left to the script. Raises `UserError` for what Slurm cannot carry.
    """

    config: Config
    checkout: Path
    script: Path
    words: tuple[str, ...]
    trains: bool = True

    def __post_init__(self) -> None:
        site, folder = self.config.igrpo.site, self.config.logger.log_dir
        for text in (*self.words, folder):
            if not text.isprintable():
                raise UserError(f"{text!r} holds a character that a job script cannot be given")
        if "\\" in folder:
            raise UserError(f"logger.log_dir={folder}: Slurm takes no backslash there")
        if site.time is not None and time_in_seconds(site.time) <= site.save_margin_s:
            raise UserError(
                f"igrpo.site.time={site.time} is not longer than igrpo.site.save_margin_s="
                f"{site.save_margin_s}: the run would be stopped as it starts"
            )

    @property
    def run_folder(self) -> Path:
        return absolute(self.config.logger.log_dir, self.checkout)

    @property
    def name(self) -> str:
        return job_name(self.run_folder) if self.trains else self.script.stem


def sbatch_command(job: Submission, after: int | str | None = None) -> list[str]:
    """The command line; `after` is the job that has to succeed first, in a chain."""
    return ["sbatch", *_options(job, after), str(job.script), *job.words]


def _options(job: Submission, after: int | str | None) -> Iterator[str]:
    site, cluster = job.config.igrpo.site, job.config.cluster
    yield "--parsable"
    if job.trains:
        yield f"--job-name={job.name}"
        yield f"--nodes={cluster.num_nodes}"
        yield f"--gpus-per-node={0 if site.gpu == 'cpu' else cluster.gpus_per_node}"
    yield from _account_options(site)
    if site.time is not None:
        yield f"--time={site.time}"
    yield f"--signal=B:USR1@{site.save_margin_s}"
    yield "--requeue"
    yield "--open-mode=append"
    yield _output_option(job.run_folder, "%j")
    if after is not None:
        yield f"--dependency=afterok:{after},singleton"
        yield "--kill-on-invalid-dep=yes"
    elif job.trains:
        yield "--dependency=singleton"
    yield from site.sbatch


def _account_options(site: Site) -> Iterator[str]:
    for option in ("account", "partition", "qos", "constraint", "reservation"):
        if (value := getattr(site, option)) is not None:
            yield f"--{option}={value}"


def _output_option(run_folder: Path, name: str) -> str:
    """Where a job's output goes. Slurm replaces %x: what stands in the folder's own name is no
    pattern."""
    return f"--output={str(run_folder).replace('%', '%%')}/{LOGS}/{name}.out"


def find_checkout(start: Path) -> Path:
    """`start` where it is a checkout, else the one that this package lies in.

    Raises `UserError` where neither has the scripts, as in an installed wheel.
    """
    for folder in (start, Path(__file__).resolve().parents[2]):
        if (folder / GENERIC_SCRIPT).is_file():
            return folder
    raise UserError(
        f"{GENERIC_SCRIPT} is neither here nor beside the installed package: run igrpo launch in a "
        "checkout of igrpo-nemo"
    )


def find_script(name: str | None, start: Path, checkout: Path) -> Path:
    """The script to submit: the generic one, or a named one, looked for in `start` first.

    A path inside the checkout is given relative to it, which is where sbatch is started.
    """
    if name is None:
        return Path(GENERIC_SCRIPT)
    for folder in (start, checkout, checkout / "slurm"):
        if (path := folder / name).is_file():
            path, root = path.resolve(), checkout.resolve()
            return path.relative_to(root) if path.is_relative_to(root) else path
    scripts = sorted((checkout / "slurm").glob("*.sh"))
    known = ", ".join(f"slurm/{s.name}" for s in scripts if "#SBATCH" in _text(s))
    raise UserError(f"there is no script {name}: use {known}")


def script_words(script: Path) -> list[str]:
    """What a named script puts before the command line's words: its experiment."""
    names = re.findall(r"^EXPERIMENT=([\w.-]+)$", _text(script), re.M)
    return [f"experiment={name}" for name in names]


def _text(script: Path) -> str:
    return script.read_text(encoding="utf-8", errors="replace")


@dataclass(frozen=True, slots=True)
class StageJob:
    """A short stage as a job: one node, `command` in the checkout, once the jobs `after` succeed.

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

    @property
    def variables(self) -> dict[str, str]:
        """Those that a stage is given."""
        return {n: v for n, v in self.settings.items() if v and n not in _NOT_FOR_THE_STAGE}

    @property
    def run_folders(self) -> list[Path]:
        """The run's folder, and the one of its checkpoints where that lies elsewhere."""
        checkpoints = Path(self.settings["IGRPO_CHECKPOINT_DIR"])
        return [self.run] if self.run in checkpoints.parents else [self.run, checkpoints]


def script_path(job: StageJob, where: Surroundings) -> Path:
    return where.run / "stages" / f"{job.stage}.sh"


def script_text(job: StageJob, where: Surroundings) -> str:
    """The batch script. Raises `UserError` for a value that an #SBATCH line cannot hold."""
    lines = ["#!/usr/bin/env bash", f"# Stage {job.stage} of {where.run.name}."]
    for option in _stage_options(job, where):
        # Slurm ends such a line at `#`, and splits it at blanks.
        if not _PLAIN.fullmatch(option):
            raise UserError(f"{option!r} cannot stand in a job script: use no blanks and no #")
        lines.append(f"#SBATCH {option}")
    lines += ["set -euo pipefail", f"cd {shlex.quote(str(where.checkout))}"]
    if where.site.container:
        lines.append(f"unset {HOST_PATHS}")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in where.variables.items()]
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


def _stage_options(job: StageJob, where: Surroundings) -> Iterator[str]:
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
    yield from _account_options(site)
    yield _output_option(where.run, f"{job.stage}-%j")
    if job.after:
        yield f"--dependency=afterok:{':'.join(str(number) for number in job.after)}"
        yield "--kill-on-invalid-dep=yes"
    yield from site.sbatch


def _srun(where: Surroundings) -> Sequence[str]:
    """The step: in the profile's container, or on the node itself."""
    site = where.site
    # Slurm would tie a single task to a single CPU.
    step = ["srun", "--ntasks=1", "--cpu-bind=none"]
    if not site.container:
        return step
    own = (where.checkout, *where.run_folders, site.hf_home)
    there = {mount.split(":")[1] for mount in site.mounts}
    missing = [str(path) for path in own if path and str(path) not in there]
    mounts = [*site.mounts, *(f"{path}:{path}" for path in missing)]
    return [
        *step,
        f"--container-image={site.container}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={where.checkout}",
        "--no-container-mount-home",
        f"--container-env={','.join(sorted(where.variables))}",
        *("bash", "-c", 'PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "$@"', "bash"),
    ]

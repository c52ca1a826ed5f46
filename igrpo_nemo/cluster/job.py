"""The jobs of a run: their script in the checkout, name, logs, and the sbatch command line.

RUN/slurm/<job id>.out                  what the job script prints
RUN/slurm/<job id>-<restart>/           one start: driver.log, launcher.log, head.log, ...

A job is submitted from a checkout, and works in its folder. The options are those of Slurm 22.05.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from igrpo_nemo.cluster.client import Job
from igrpo_nemo.cluster.site import absolute
from igrpo_nemo.config import Config
from igrpo_nemo.config.igrpo_keys import Site, time_in_seconds
from igrpo_nemo.errors import UserError

LOGS = "slurm"

_START = re.compile(r"(\d+)-(\d+)")


def job_name(run_folder: Path) -> str:
    """The name that all jobs of a run share, and no other run's: `--dependency=singleton` lets
    one of a name run at a time."""
    path = str(run_folder.resolve())
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).name).strip("-")[:40]
    return f"igrpo-{base}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def log_folders(run_folder: Path) -> dict[tuple[int, int], Path]:
    """The logs of each start, by (job id, restart), in their order."""
    found = (entry for entry in (run_folder / LOGS).glob("*-*") if _START.fullmatch(entry.name))
    starts = {tuple(map(int, entry.name.split("-"))): entry for entry in found}
    return dict(sorted(starts.items()))  # type: ignore[arg-type]


def jobs_of(run_folder: Path, jobs: Sequence[Job]) -> list[Job]:
    """The jobs of a run, oldest first: those of its name, and those that have logged in its folder,
    since a script that was submitted by hand has a name of its own."""
    name, logged = job_name(run_folder), {job for job, _ in log_folders(run_folder)}
    return sorted(
        (job for job in jobs if job.name == name or job.id in logged), key=lambda job: job.id
    )


_ACCOUNT_OPTIONS = ("account", "partition", "qos", "constraint", "reservation")


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
    yield from account_options(site)
    if site.time is not None:
        yield f"--time={site.time}"
    yield f"--signal=B:USR1@{site.save_margin_s}"
    yield "--requeue"
    yield "--open-mode=append"
    yield output_option(job.run_folder, "%j")
    if after is not None:
        yield f"--dependency=afterok:{after},singleton"
        yield "--kill-on-invalid-dep=yes"
    elif job.trains:
        yield "--dependency=singleton"
    yield from site.sbatch


def account_options(site: Site) -> Iterator[str]:
    """The options that say for whom and on which nodes a job runs."""
    for option in _ACCOUNT_OPTIONS:
        if (value := getattr(site, option)) is not None:
            yield f"--{option}={value}"


def output_option(run_folder: Path, name: str) -> str:
    """Where a job's output goes. Slurm replaces %x: what stands in the folder's own name is no
    pattern."""
    return f"--output={str(run_folder).replace('%', '%%')}/{LOGS}/{name}.out"


GENERIC_SCRIPT = "slurm/train.sh"
EVALUATION_SCRIPT = "evaluate.sh"
"""The one script that trains nothing: its words are those of pipelines/evaluate.py."""


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
            path = path.resolve()
            root = checkout.resolve()
            return path.relative_to(root) if path.is_relative_to(root) else path
    known = ", ".join(
        sorted(
            f"slurm/{path.name}"
            for path in (checkout / "slurm").glob("*.sh")
            if "#SBATCH" in path.read_text(encoding="utf-8", errors="replace")
        )
    )
    raise UserError(f"there is no script {name}: use {known}")


def script_words(script: Path) -> list[str]:
    """What a named script puts before the command line's words: its experiment."""
    text = script.read_text(encoding="utf-8", errors="replace")
    return [f"experiment={name}" for name in re.findall(r"^EXPERIMENT=([\w.-]+)$", text, re.M)]

"""Sending an evaluation's missing samples to a cluster, through a NeMo-Skills cluster profile.

ClusterProfile --place--> Place --submit--> jobs (`ns eval --cluster`), OUT/submitted.json
    later: the same command reads the files, and sends what is missing
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import yaml

from igrpo_nemo.errors import UserError
from igrpo_nemo.skills.cluster_yaml import ACCOUNT
from igrpo_nemo.skills.command import Place, eval_commands, mounted_path
from igrpo_nemo.skills.environment import child_environ, without_secrets
from igrpo_nemo.skills.evaluate import (
    Evaluation,
    FolderLock,
    mend_and_inspect,
    new_log,
    prepare,
)
from igrpo_nemo.skills.processes import run_logged
from igrpo_nemo.slurm import has_slurm, my_jobs
from igrpo_nemo.tracking.atomic import write_atomic

SUBMITTED_FILE = "submitted.json"

_LAUNCHED = re.compile(r"Launched app: slurm_tunnel://[^/\s]+/(\d+)")
"""What NeMo-Run says of each job that Slurm took."""


@dataclass(frozen=True, slots=True)
class ClusterProfile:
    """A cluster profile of NeMo-Skills: its name, its folder, and what its containers mount."""

    name: str
    config_dir: Path
    mounts: tuple[str, ...]
    executor: str
    account: str | None

    def seen(self, path: str) -> str:
        """A path as the jobs see it; a model's name on the hub is itself."""
        if not path.startswith("/"):
            return path
        return mounted_path(Path(path), self.mounts)

    def place(
        self,
        out: Path,
        *,
        jobs: int,
        expname: str | None = None,
        sbatch: Mapping[str, str] | None = None,
    ) -> Place:
        """Where an evaluation runs whose folder here is `out`."""
        here = str(out.absolute())
        digest = hashlib.sha256(here.encode()).hexdigest()[:8]
        return Place(
            out=self.seen(here),
            cluster=self.name,
            config_dir=self.config_dir.absolute(),
            jobs=jobs,
            expname=expname or f"eval-{digest}",
            sbatch=sbatch or {},
        )

    def check_account(self) -> None:
        """Raises `UserError` for a profile as it is shipped."""
        if self.account == ACCOUNT:
            raise UserError(
                f"{self.config_dir / self.name}.yaml names no account: set it there, or make the "
                "profile from yours with `python pipelines/cluster_config.py`"
            )


def cluster_profile(name: str, config_dir: Path) -> ClusterProfile:
    """Reads `config_dir/name.yaml`. Raises `UserError` where there is no such profile."""
    path = config_dir / f"{name}.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        mounts = tuple(os.path.expandvars(mount) for mount in values.get("mounts") or [])
        executor, account = str(values["executor"]), values.get("account")
    except FileNotFoundError:
        have = ", ".join(sorted(file.stem for file in config_dir.glob("*.yaml"))) or "none"
        raise UserError(f"there is no cluster profile {path}: there are {have}") from None
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no cluster profile: {' '.join(str(error).split())}") from error
    if executor == "none":
        raise UserError(f"cluster profile {name} is this machine: leave out --cluster")
    return ClusterProfile(name, config_dir, mounts, executor, account)


def submit(
    evaluation: Evaluation, place: Place, environ: Mapping[str, str], *, dry_run: bool = False
) -> list[str] | None:
    """Sends what is missing; the benchmarks that were sent, None where nothing is missing.

    With `dry_run` NeMo-Skills checks every argument and sends nothing. Raises `UserError` with the
    last line that NeMo-Skills said where it refuses.
    """
    with closing(FolderLock(evaluation.out)):
        evaluation = prepare(evaluation)
        lacking = mend_and_inspect(evaluation)
        if not lacking:
            return None
        names = [one.benchmark for one in lacking]
        child = without_secrets(child_environ(evaluation.environment.bin, environ))
        log = new_log(evaluation.out)
        # In a git checkout NeMo-Skills would pack that one up and send it along.
        with tempfile.TemporaryDirectory() as outside:
            for arguments in eval_commands(evaluation.setting, names, evaluation.server, place):
                command = [str(evaluation.environment.ns), *arguments]
                command += ["--dry_run"] if dry_run else []
                code = run_logged(command, log, cwd=Path(outside), environ=child)
                if code:
                    raise UserError(f"ns eval refused (exit {code}): {_last_line(log)}; see {log}")
        if not dry_run:
            jobs = [int(number) for number in _LAUNCHED.findall(log.read_text(errors="replace"))]
            note = {
                "expname": place.expname,
                "time": time.time(),
                "benchmarks": names,
                "jobs": jobs,
            }
            write_atomic(evaluation.out / SUBMITTED_FILE, json.dumps(note).encode())
        return names


def check_not_running(out: Path) -> None:
    """Raises `UserError` while jobs that were sent for this folder may still write into it."""
    try:
        note = json.loads((out / SUBMITTED_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return
    if not has_slurm():
        raise UserError(
            f"{out} waits for jobs {note['expname']} of a cluster that this machine cannot ask: "
            "once they have ended, give --again"
        )
    running = [job for job in my_jobs() if job.active and note["expname"] in job.name]
    if running:
        raise UserError(
            f"{len(running)} jobs {note['expname']} are queued or running for {out}: "
            "wait until they end"
        )


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it said nothing")

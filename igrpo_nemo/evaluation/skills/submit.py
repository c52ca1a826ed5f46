"""Sending an evaluation's missing samples to a cluster, through a NeMo-Skills cluster profile.

ClusterProfile --place--> Place --submit--> jobs (`ns eval --cluster`), OUT/submitted.json
    later: the same command reads the files, and sends what is missing
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import yaml

from igrpo_nemo.cluster.job import sbatch_environment
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.skills import sbatch_text
from igrpo_nemo.evaluation.skills.cluster_yaml import ACCOUNT
from igrpo_nemo.evaluation.skills.command import Place, eval_commands, mounted_path
from igrpo_nemo.evaluation.skills.environment import child_environ, without_secrets
from igrpo_nemo.evaluation.skills.evaluate import (
    FolderLock,
    SkillsEvaluation,
    lacking_of,
    mend_and_inspect,
    new_log,
    prepare,
)
from igrpo_nemo.evaluation.skills.processes import last_line, run_logged
from igrpo_nemo.evaluation.skills.submitted import check_not_running, write_note

_LAUNCHED = re.compile(r"Launched app: slurm_tunnel://[^/\s]+/(\d+)")
"""What NeMo-Run says of each job that Slurm took."""
_RENDER_S = 300


@dataclass(frozen=True, slots=True)
class ClusterProfile:
    """A cluster profile of NeMo-Skills: its name, its folder, and what its containers mount."""

    name: str
    config_dir: Path
    mounts: tuple[str, ...]
    executor: str
    account: str | None
    job_dir: Path | None = None
    """Where this machine writes the jobs' files."""

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

    def check_own(self) -> None:
        """Raises `UserError` for a profile as it is shipped: without an account, or with folders
        that are not here."""
        problem = None
        if self.account == ACCOUNT:
            problem = "names no account"
        elif self.job_dir is not None and not self.job_dir.parent.is_dir():
            problem = (
                f"has {self.job_dir} for its jobs' files, but there is no {self.job_dir.parent}"
            )
        if problem:
            raise UserError(
                f"cluster profile {self.name} {problem}: make one of your own with "
                "`python pipelines/cluster_config.py --workspace DIR` (docs/evaluation.md)"
            )


def cluster_profile(name: str, config_dir: Path) -> ClusterProfile:
    """Reads `config_dir/name.yaml`. Raises `UserError` where there is no such profile."""
    path = config_dir / f"{name}.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        mounts = tuple(os.path.expandvars(mount) for mount in values.get("mounts") or [])
        executor, account = str(values["executor"]), values.get("account")
        job_dir = values.get("job_dir")
    except FileNotFoundError:
        have = ", ".join(sorted(file.stem for file in config_dir.glob("*.yaml"))) or "none"
        raise UserError(f"there is no cluster profile {path}: there are {have}") from None
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no cluster profile: {' '.join(str(error).split())}") from error
    if executor == "none":
        raise UserError(f"cluster profile {name} is this machine: leave out --cluster")
    return ClusterProfile(
        name, config_dir, mounts, executor, account, Path(job_dir) if job_dir else None
    )


def submit(
    evaluation: SkillsEvaluation,
    place: Place,
    environ: Mapping[str, str],
    *,
    dry_run: bool = False,
    again: bool = False,
) -> list[int] | None:
    """Sends what is missing; the numbers of the jobs, None where nothing is missing.

    With `dry_run` NeMo-Skills checks every argument and sends nothing. Raises `UserError` with the
    last line that NeMo-Skills said where it refuses, and while jobs that were sent before may
    still write into the folder; `again` says that none does.
    """
    with closing(FolderLock(evaluation.out)):
        if not again:
            check_not_running(evaluation.out)
        evaluation = prepare(evaluation)
        lacking = lacking_of(evaluation) if dry_run else mend_and_inspect(evaluation)
        if not lacking:
            return None
        names = [one.benchmark for one in lacking]
        log = new_log(evaluation.out)
        if dry_run:
            _run_ns(evaluation, place, environ, names, log, "--dry_run")
            return []
        return _send(evaluation, place, environ, names, log)


def _send(
    evaluation: SkillsEvaluation,
    place: Place,
    environ: Mapping[str, str],
    names: Sequence[str],
    log: Path,
) -> list[int]:
    """Sends the jobs and notes them, also those that were sent before a failure."""
    # Noted before the first one is sent: a call that is killed here may leave jobs behind.
    write_note(evaluation.out, place.expname, names, [])
    try:
        _run_ns(evaluation, place, environ, names, log)
    except UserError as error:
        ids = " ".join(map(str, _launched(log)))
        told = f"; sent before that: {ids} (scancel {ids} takes them back)" if ids else ""
        raise UserError(f"{error}{told}") from error
    finally:
        write_note(evaluation.out, place.expname, names, _launched(log))
    return _launched(log)


def _run_ns(
    evaluation: SkillsEvaluation,
    place: Place,
    environ: Mapping[str, str],
    names: Sequence[str],
    log: Path,
    *flags: str,
) -> None:
    child = without_secrets(child_environ(evaluation.environment.bin, sbatch_environment(environ)))
    # In a git checkout NeMo-Skills would pack that one up and send it along.
    with tempfile.TemporaryDirectory() as outside:
        for arguments in eval_commands(evaluation.setting, names, evaluation.server, place):
            command = [str(evaluation.environment.ns), *arguments, *flags]
            code = run_logged(command, log, cwd=Path(outside), environ=child)
            if code:
                raise UserError(f"ns eval refused (exit {code}): {last_line(log)}; see {log}")


def _launched(log: Path) -> list[int]:
    """The jobs that Slurm took, by what NeMo-Skills said."""
    if not log.is_file():
        return []
    return [int(number) for number in _LAUNCHED.findall(log.read_text(errors="replace"))]


def evaluation_text(evaluation: SkillsEvaluation, place: Place, environ: Mapping[str, str]) -> str:
    """The `ns` commands, and every batch file and script that they would submit.

    Raises `UserError` with NeMo-Skills' last line where it refuses, and while jobs that were sent
    before read what is written here for it.
    """
    parts = [evaluation.setting.to_json().rstrip()]
    child = without_secrets(child_environ(evaluation.environment.bin, environ))
    with closing(FolderLock(evaluation.out)):
        check_not_running(evaluation.out)
        prepared = prepare(evaluation)
    # In a git checkout NeMo-Skills would look at that one.
    with tempfile.TemporaryDirectory() as outside:
        for arguments in eval_commands(prepared.setting, prepared.names, prepared.server, place):
            parts.append(f"# {shlex.join(['ns', *arguments])}")
            done = subprocess.run(
                [str(evaluation.environment.python), sbatch_text.__file__, *arguments],
                cwd=outside,
                env=child,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_RENDER_S,
            )
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if line.strip()]
                raise UserError(f"ns eval refused: {lines[-1].strip() if lines else 'no reason'}")
            parts.append(done.stdout.rstrip())
    return "\n".join(parts)

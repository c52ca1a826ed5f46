"""Sending an evaluation's missing samples to a cluster, and whether what was sent still writes.

SkillsEvaluation + Place --submit--> jobs (`ns eval --cluster`), noted in OUT/submitted.json
    later: the same command reads the files, and sends what is missing
--evaluation_text--> the same jobs, as text
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from igrpo_nemo.cluster.site import sbatch_environment
from igrpo_nemo.config.igrpo_keys import Site
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.skills import sbatch_text
from igrpo_nemo.evaluation.skills.cluster_profile import ClusterProfile, sbatch_options
from igrpo_nemo.evaluation.skills.command import Place, eval_commands
from igrpo_nemo.evaluation.skills.evaluate import (
    ADVICE,
    SUBMITTED_FILE,
    SkillsEvaluation,
    check_not_running,
    lacking_of,
    new_log,
    prepare,
)
from igrpo_nemo.evaluation.skills.program import (
    child_environ,
    last_line,
    run_logged,
    without_secrets,
)
from igrpo_nemo.files.atomic import write_atomic
from igrpo_nemo.run.lock import alone_in

_LAUNCHED = re.compile(r"Launched app: slurm_tunnel://[^/\s]+/(\d+)")
"""What NeMo-Run says of each job that Slurm took."""
_RENDER_S = 300


def placed(
    evaluation: SkillsEvaluation, profile: ClusterProfile, site: Site, jobs: int
) -> tuple[SkillsEvaluation, Place]:
    """The evaluation with its model where the containers of a profile see it, and its place."""
    here = str(evaluation.out.absolute())
    place = Place(
        out=profile.seen(here),
        cluster=profile.name,
        config_dir=profile.config_dir.absolute(),
        jobs=jobs,
        expname=f"eval-{hashlib.sha256(here.encode()).hexdigest()[:8]}",
        sbatch=sbatch_options(site),
    )
    if evaluation.server.address is None:
        server = replace(evaluation.server, model=profile.seen(evaluation.server.model))
        evaluation = replace(evaluation, server=server)
    return evaluation, place


def submit(
    evaluation: SkillsEvaluation,
    place: Place,
    environ: Mapping[str, str],
    *,
    dry_run: bool = False,
    again: bool = False,
) -> list[int]:
    """Sends what is missing; the numbers of the jobs, none where nothing is missing.

    With `dry_run` NeMo-Skills checks every argument and sends nothing. Raises `UserError` with the
    last line that NeMo-Skills said where it refuses, and while jobs that were sent before may
    still write into the folder; `again` says that none does.
    """
    out = evaluation.out
    with alone_in(out, ADVICE):
        if not again:
            check_not_running(out)
        evaluation = prepare(evaluation)
        lacking = lacking_of(evaluation, mend=not dry_run)
        if not lacking:
            return []
        names, log = [one.benchmark for one in lacking], new_log(out)
        if dry_run:
            _run_ns(evaluation, place, environ, names, log, "--dry_run")
            return []
        # Noted before the first one is sent: a call that is killed here may leave jobs behind.
        write_note(out, place.expname, names, [])
        try:
            _run_ns(evaluation, place, environ, names, log)
        except UserError as error:
            ids = " ".join(map(str, _launched(log)))
            told = f"; sent before that: {ids} (scancel {ids} takes them back)" if ids else ""
            raise UserError(f"{error}{told}") from error
        finally:
            write_note(out, place.expname, names, _launched(log))
        if not (sent := _launched(log)):
            raise UserError(f"NeMo-Skills named no job that it submitted: see {log}")
        return sent


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
            command = [evaluation.environment.ns, *arguments, *flags]
            if code := run_logged(command, log, cwd=Path(outside), environ=child):
                raise UserError(f"ns eval refused (exit {code}): {last_line(log)}; see {log}")


def _launched(log: Path) -> list[int]:
    """The jobs that Slurm took, by what NeMo-Skills said."""
    if not log.is_file():
        return []
    return [int(number) for number in _LAUNCHED.findall(log.read_text(errors="replace"))]


def write_note(out: Path, expname: str, benchmarks: Sequence[str], jobs: Sequence[int]) -> None:
    """Notes what is sent: the name that all of its jobs have, and the numbers that are known."""
    note = {"expname": expname, "time": time.time(), "benchmarks": benchmarks, "jobs": jobs}
    write_atomic(out / SUBMITTED_FILE, json.dumps(note).encode())


def evaluation_text(
    evaluation: SkillsEvaluation, place: Place, environ: Mapping[str, str], config_dir: Path
) -> str:
    """The `ns` commands, and every batch file and script that they would submit.

    The commands name the folder of `place`'s profile; it is read from `config_dir`. Raises
    `UserError` with NeMo-Skills' last line where it refuses, and while jobs that were sent before
    read what is written here for it.
    """
    parts = [evaluation.setting.to_json().rstrip()]
    child = without_secrets(child_environ(evaluation.environment.bin, environ))
    with alone_in(evaluation.out, ADVICE):
        check_not_running(evaluation.out)
        evaluation = prepare(evaluation)
    setting, names, server = evaluation.setting, evaluation.names, evaluation.server
    shown = eval_commands(setting, names, server, place)
    rendered = eval_commands(setting, names, server, replace(place, config_dir=config_dir))
    # In a git checkout NeMo-Skills would look at that one.
    with tempfile.TemporaryDirectory() as outside:
        for told, arguments in zip(shown, rendered, strict=True):
            command = [evaluation.environment.python, sbatch_text.__file__, *arguments]
            done = subprocess.run(
                command,
                cwd=outside,
                env=child,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_RENDER_S,
            )
            if done.returncode:
                lines = done.stderr.split("\n")
                reason = next((line.strip() for line in lines[::-1] if line.strip()), "no reason")
                raise UserError(f"ns eval refused: {reason}")
            parts += [f"# {shlex.join(['ns', *told])}", done.stdout.rstrip()]
    return "\n".join(parts)

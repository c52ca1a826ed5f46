"""NeMo-Skills on a cluster: its profiles, made from ours, and sending what an evaluation lacks.

Site + workspace + images --cluster_values--> values --cluster_text--> cluster_configs/NAME.yaml
NAME.yaml --cluster_profile--> ClusterProfile
SkillsEvaluation + Place --submit--> jobs (`ns eval --cluster`), noted in OUT/submitted.json
    later: the same command reads the files, and sends what is missing
--evaluation_text--> the same jobs, as text

A machine without a scheduler gets the executor `none`: plain processes, no containers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from igrpo_nemo.cluster.client import naming_submitted
from igrpo_nemo.cluster.site import sbatch_environment
from igrpo_nemo.config.igrpo_keys import Site
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.skills import sbatch_text
from igrpo_nemo.evaluation.skills.command import Place, eval_commands
from igrpo_nemo.evaluation.skills.evaluate import (
    SUBMITTED_FILE,
    SkillsEvaluation,
    claimed,
    lacking_of,
    new_log,
)
from igrpo_nemo.evaluation.skills.program import (
    child_environ,
    last_line,
    run_logged,
    without_secrets,
)
from igrpo_nemo.files.atomic import write_atomic, write_or_refuse

_LAUNCHED = re.compile(r"Launched app: slurm_tunnel://[^/\s]+/(\d+)")
"""What NeMo-Run says of each job that Slurm took."""
_RENDER_S = 300


def placed(evaluation: SkillsEvaluation, profile: ClusterProfile, site: Site, jobs: int) -> Place:
    """The place of an evaluation on a cluster, with paths as the containers of its profile see
    them."""
    here, model = str(evaluation.out.absolute()), evaluation.setting.model
    return Place(
        out=profile.seen(here),
        model=profile.seen(model) if evaluation.address is None else None,
        cluster=profile.name,
        config_dir=profile.config_dir.absolute(),
        jobs=jobs,
        expname=f"eval-{hashlib.sha256(here.encode()).hexdigest()[:8]}",
        sbatch=sbatch_options(site),
    )


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
    with claimed(evaluation, again=again) as evaluation:
        names = [one.benchmark for one in lacking_of(evaluation, mend=not dry_run)]
        if not names:
            return []
        log = new_log(out)
        if dry_run:
            _run_ns(evaluation, place, environ, names, log, "--dry_run")
            return []
        # Noted before the first one is sent: a call that is killed here may leave jobs behind.
        write_note(out, place.expname, names, [])
        try:
            with naming_submitted(lambda: _launched(log)):
                _run_ns(evaluation, place, environ, names, log)
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
        for arguments in eval_commands(evaluation, names, place):
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
    with claimed(evaluation) as evaluation:
        pass  # what NeMo-Skills reads is there
    shown, rendered = (
        eval_commands(evaluation, evaluation.names, each)
        for each in (place, replace(place, config_dir=config_dir))
    )
    # In a git checkout NeMo-Skills would look at that one.
    with tempfile.TemporaryDirectory() as outside:
        for told, arguments in zip(shown, rendered, strict=True):
            command = [evaluation.environment.python, sbatch_text.__file__, *arguments]
            try:
                done = subprocess.run(
                    command,
                    cwd=outside,
                    env=child,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    timeout=_RENDER_S,
                )
            except subprocess.TimeoutExpired:
                raise UserError(f"ns eval did not answer within {_RENDER_S} s") from None
            if done.returncode:
                lines = done.stderr.split("\n")
                reason = next((line.strip() for line in lines[::-1] if line.strip()), "no reason")
                raise UserError(f"ns eval refused: {reason}")
            parts += [f"# {shlex.join(['ns', *told])}", done.stdout.rstrip()]
    return "\n".join(parts)


WORKSPACE = "/workspace"
DEFAULT_TIME = "04:00:00"
ACCOUNT, PARTITION = "ACCOUNT", "PARTITION"
"""Stand in a profile whose site does not say them, for the user to replace."""

IMAGES = {"nemo-skills": "nemo-skills-0.7.sqsh", "vllm": "vllm.sqsh", "nemo-rl": "nemo-rl.sqsh"}
"""Container images by NeMo-Skills' names, as files in a folder of images."""

_HEAD = """\
# A cluster profile of NeMo-Skills, for --cluster={name} --config_dir=configs/cluster_configs.
# Made from the project's own: python pipelines/cluster_config.py {words}
"""


@dataclass(frozen=True, slots=True)
class ClusterProfile:
    """A cluster profile of NeMo-Skills, `config_dir/NAME.yaml`, and what its containers mount."""

    name: str
    config_dir: Path
    values: Mapping[str, Any]
    mounts: tuple[str, ...]

    def seen(self, path: str) -> str:
        """A path as the jobs see it; a model's name on the hub is itself.

        Raises `UserError` where no mount has it.
        """
        if not path.startswith("/"):
            return path
        for mount in self.mounts:
            source, destination, *_ = mount.split(":")
            if Path(path).is_relative_to(source):
                return str(Path(destination) / Path(path).relative_to(source))
        known = ", ".join(self.mounts) or "it has none"
        raise UserError(
            f"{path} is in none of the cluster profile's mounts ({known}): "
            "use a folder that the containers see"
        )

    def check_own(self) -> None:
        """Raises `UserError` for a profile as it is shipped: without an account, or with folders
        that are not here."""
        problem, job_dir = None, self.values.get("job_dir")  # where this machine writes for jobs
        if self.values.get("account") == ACCOUNT:
            problem = "names no account"
        elif job_dir and not (parent := Path(job_dir).parent).is_dir():
            problem = f"has {job_dir} for its jobs' files, but there is no {parent}"
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
        on_slurm = values["executor"] != "none"
    except FileNotFoundError:
        have = ", ".join(sorted(file.stem for file in config_dir.glob("*.yaml"))) or "none"
        raise UserError(f"there is no cluster profile {path}: there are {have}") from None
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no cluster profile: {' '.join(str(error).split())}") from error
    if not on_slurm:
        raise UserError(f"cluster profile {name} is this machine: leave out --cluster")
    return ClusterProfile(name, config_dir, values, mounts)


def profile_for(
    site: Site, name: str, config_dir: Path, needed: Sequence[Path], folder: Path
) -> ClusterProfile:
    """A profile completed for a chain, in `folder/NAME.yaml`: what the site says wins, and every
    `needed` folder (absolute) that no mount has is mounted at its own name, as the training's
    containers do."""
    profile = cluster_profile(name, config_dir)
    own = {"account": site.account, "partition": site.partition, "default_timeout": site.time}
    sources = [mount.split(":")[0] for mount in profile.mounts]
    missing = [p for p in needed if not any(p.is_relative_to(source) for source in sources)]
    mounts = [*(profile.values.get("mounts") or []), *(f"{path}:{path}" for path in missing)]
    values = {**profile.values, **{key: value for key, value in own.items() if value}}
    # A chain's stages start where the one before succeeded.
    values |= {"dependency_type": "afterok", "mounts": mounts}
    write_or_refuse(folder / f"{name}.yaml", yaml.safe_dump(values, sort_keys=False))
    return cluster_profile(name, folder)


def cluster_values(
    site: Site, *, workspace: str = WORKSPACE, images: str | None = None
) -> dict[str, Any]:
    """The profile's keys. `workspace` is a folder of the shared disk for jobs and results; the
    containers see it under the same name. `images` holds the container images.

    Raises `UserError` for a value that NeMo-Skills cannot read.
    """
    if site.gpu == "cpu":
        return {"executor": "none", "containers": {name: "none" for name in IMAGES}}
    folder = images or f"{workspace}/images"
    hf_home = site.hf_home or f"{workspace}/hf"
    containers = {name: f"{folder}/{file}" for name, file in IMAGES.items()}
    return {
        "executor": "slurm",
        "containers": containers | ({"nemo-rl": site.container} if site.container else {}),
        "account": site.account or ACCOUNT,
        "partition": site.partition or PARTITION,
        "job_dir": f"{workspace}/nemo_run",
        "job_name_prefix": "igrpo-",
        "mounts": _mounts(site.mounts, [workspace, hf_home]),
        "env_vars": _variables(site, hf_home),
        "default_timeout": site.time or DEFAULT_TIME,
        # A stage starts where the one before it succeeded; NeMo-Skills' default is afterany.
        "dependency_type": "afterok",
    }


def cluster_text(name: str, words: Sequence[str], values: dict[str, Any]) -> str:
    """The file: `words` are the command line that made it."""
    head = _HEAD.format(name=name, words=" ".join(words))
    if values.get("account") == ACCOUNT or values.get("partition") == PARTITION:
        head += (
            f"# Replace {ACCOUNT} and {PARTITION}, and the folders by yours on the shared disk.\n"
        )
    return head + yaml.safe_dump(values, sort_keys=False, width=100)


def sbatch_options(site: Site) -> dict[str, str]:
    """What a NeMo-Skills profile has no key for; `ns` takes it as `--sbatch_kwargs`."""
    values = {"qos": site.qos, "constraint": site.constraint, "reservation": site.reservation}
    return {name: value for name, value in values.items() if value}


def _mounts(mounts: Sequence[str], needed: Sequence[str]) -> list[str]:
    """SOURCE:DESTINATION alone (NeMo-Skills reads no `:ro`), with the needed folders among them."""
    kept = [":".join(mount.split(":")[:2]) for mount in mounts]
    for folder in needed:
        targets = [mount.split(":")[1] for mount in kept]
        if not any(PurePosixPath(folder).is_relative_to(target) for target in targets):
            kept.append(f"{folder}:{folder}")
    return kept


def _variables(site: Site, hf_home: str) -> list[str]:
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"} if site.offline else {}
    values = {"HF_HOME": hf_home, **offline, **site.env}
    for name, value in values.items():
        if "=" in value:
            raise UserError(f"igrpo.site.env.{name}={value}: NeMo-Skills reads no value with a =")
    return [f"{name}={value}" for name, value in values.items()]

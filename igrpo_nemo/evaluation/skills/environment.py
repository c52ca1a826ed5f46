"""NeMo-Skills' own environment: where it is, and how its commands are called.

Its requirements conflict with newer tools, so it is never imported here: `ns` is run as a program.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from igrpo_nemo.errors import UserError
from igrpo_nemo.files import cache_folder

SUPPORTED = "0.7"
LOOPBACK = "127.0.0.1,localhost"
SECRETS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "NVIDIA_API_KEY",
    "NGC_API_KEY",
    "AZURE_OPENAI_API_KEY",
    "OPENAI_API_KEY",
)
"""NeMo-Skills writes those that are set into the batch scripts of its jobs."""

PROGRAMS = {
    "curl": "NeMo-Skills waits for servers with it",
    "ps": "what an evaluation has started is found with it (package procps)",
}
"""What has to be on PATH besides, and why."""

HOW_TO_INSTALL = (
    "install NeMo-Skills as its README says, into an environment of its own, and set "
    "NEMO_SKILLS_ENV to that folder (docs/evaluation.md)"
)
_VERSION = "import importlib.metadata as m; print(m.version('nemo_skills'))"


@dataclass(frozen=True, slots=True)
class SkillsEnvironment:
    """An environment with NeMo-Skills: the folder of its `ns` and `python`, and the version."""

    bin: Path
    version: str

    @property
    def ns(self) -> Path:
        return self.bin / "ns"

    @property
    def python(self) -> Path:
        return self.bin / "python"


def find_environment(environ: Mapping[str, str]) -> SkillsEnvironment:
    """The environment of `NEMO_SKILLS_ENV`, of `VENV`, of the `ns` on PATH, or of the cache.

    Raises `UserError` where there is none, where it cannot run, and where one of `PROGRAMS` is
    missing.
    """
    folder = _bin_folder(environ)
    for program, use in PROGRAMS.items():
        if shutil.which(program, path=environ.get("PATH")) is None:
            raise UserError(f"{program} is not found: {use}, install it")
    probe = subprocess.run(
        [str(folder / "python"), "-c", _VERSION],
        capture_output=True,
        text=True,
        timeout=120,
        env=child_environ(folder, environ),
    )
    if probe.returncode:
        reason = probe.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise UserError(f"NeMo-Skills in {folder.parent} does not run: {reason[0]}")
    return SkillsEnvironment(folder, probe.stdout.strip())


def version_warning(environment: SkillsEnvironment) -> str | None:
    """A sentence where the version is another one than these pipelines were tested with."""
    if environment.version == SUPPORTED or environment.version.startswith(f"{SUPPORTED}."):
        return None
    return f"NeMo-Skills {environment.version} was not tested with this: {SUPPORTED} was"


def child_environ(bin_folder: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a NeMo-Skills command.

    Its jobs call a bare `python`, so its own folder comes first on PATH. Loopback never goes
    through a proxy.
    """
    child = dict(environ)
    child["PATH"] = os.pathsep.join([str(bin_folder), environ.get("PATH", os.defpath)])
    child.pop("PYTHONHOME", None)
    for name in ("NO_PROXY", "no_proxy"):
        child[name] = ",".join(filter(None, [environ.get(name), LOOPBACK]))
    child.setdefault("COLUMNS", "200")  # the width of its log lines
    # Otherwise every process asks the network for a price list.
    child.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    return child


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """The same without the secrets that NeMo-Skills would write into batch scripts.

    A job that reads a model from disk needs none of them.
    """
    child = {name: value for name, value in environ.items() if name not in SECRETS}
    child["HF_TOKEN_PATH"] = os.devnull
    return child


def _bin_folder(environ: Mapping[str, str]) -> Path:
    named = environ.get("NEMO_SKILLS_ENV")
    if named:
        folder = Path(named).expanduser().absolute() / "bin"
        if not (folder / "ns").is_file():
            raise UserError(f"NEMO_SKILLS_ENV={named} has no bin/ns: {HOW_TO_INSTALL}")
        return folder
    if environ.get("VENV"):
        folder = Path(environ["VENV"]).expanduser().absolute() / "bin"
        if (folder / "ns").is_file():
            return folder
    if found := shutil.which("ns", path=environ.get("PATH")):
        return Path(found).absolute().parent
    # `make install-skills` makes one there.
    cached = [file.parent for file in cache_folder().glob("nemo-skills-env-*/bin/ns")]
    if not cached:
        raise UserError(f"NeMo-Skills is not found: {HOW_TO_INSTALL}")
    return max(cached, key=lambda folder: folder.stat().st_mtime)

"""NeMo-Skills' environment for tests, made once: PyPI packages, and its source without them.

The source is `NEMO_SKILLS_SRC`, else ~/.cache/igrpo-nemo/nemo-skills; the environment lies in the
same cache, named by a hash of what is in it. As a script this makes it and prints its folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from igrpo_nemo.files import cache_folder

SOURCE = Path(os.environ.get("NEMO_SKILLS_SRC") or cache_folder() / "nemo-skills").expanduser()
WHY_NOT = f"NeMo-Skills' source is not at {SOURCE}: put it there or set NEMO_SKILLS_SRC"

# What `ns eval` imports; newer typer breaks its flags, mcp 2 its imports. No torch, no datasets.
REQUIREMENTS = (
    "nemo_run==0.11.1",
    "leptonai>=0.26.6,<0.28",
    "typer>=0.13,<0.27",
    "mcp<2",
    "litellm[caching]==1.77.5",
    "nemo-evaluator-launcher",
    "sacrebleu",
    "fire",
    "hydra-core",
    "openai",
    "math-verify[antlr4_9_3]",
    "transformers",
    "httpx",
    "requests",
    "tqdm",
    "pyyaml",
    "numpy",
    "sympy",
)


def has_source() -> bool:
    return (SOURCE / "nemo_skills" / "pipeline" / "cli.py").is_file()


def environment_folder() -> Path:
    """Where the environment of these requirements, this Python and this source belongs."""
    files = sorted((SOURCE / "nemo_skills").rglob("*"))
    source = [(str(f.relative_to(SOURCE)), f.stat().st_size) for f in files if f.suffix != ".pyc"]
    key = repr((REQUIREMENTS, sys.version_info[:2], source))
    return cache_folder() / f"nemo-skills-env-{hashlib.sha256(key.encode()).hexdigest()[:10]}"


def make_environment() -> Path:
    """The environment, made if it is not there yet; other processes wait for it meanwhile."""
    folder = environment_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".installed").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            _install(folder)
            (folder / ".installed").touch()
    return folder


def _install(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    pip.append("--no-compile")
    subprocess.run([*pip, "--upgrade", "pip"], check=False)  # an old one takes four times as long
    subprocess.run([*pip, *REQUIREMENTS], check=True)
    with tempfile.TemporaryDirectory() as scratch:  # a build leaves files in its source
        copy = Path(scratch) / "nemo-skills"
        shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns(".git", "__pycache__"))
        subprocess.run([*pip, "--no-deps", copy], check=True)


if __name__ == "__main__":
    if not has_source():
        sys.exit(f"error: {WHY_NOT}")
    print(make_environment())

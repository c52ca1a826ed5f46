"""Where the scripts are: a job is submitted from a checkout, and works in its folder."""

from __future__ import annotations

import re
from pathlib import Path

from igrpo_nemo.errors import UserError

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

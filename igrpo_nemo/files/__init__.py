"""What everybody needs of a file system and of a text: used by every room, imports none.

atomic: files that are whole or absent. scrub: configs and logs without secrets.
display_text: data that is safe to print. Here: the folder for what is kept between runs, and where
Hugging Face keeps a model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def cache_folder() -> Path:
    """Where what may be made again is kept: `IGRPO_CACHE_DIR`, or `igrpo-nemo` in the user's cache
    folder (`${XDG_CACHE_HOME:-~/.cache}/igrpo-nemo`). It need not exist yet."""
    if named := os.environ.get("IGRPO_CACHE_DIR"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "igrpo-nemo"


def model_folder(
    name: str, environ: Mapping[str, str] = os.environ, file: str = "config.json"
) -> Path | None:
    """The folder that holds a file of a model: as named, or in Hugging Face's cache."""
    folder = Path(name).expanduser()
    if (folder / file).is_file():
        return folder
    home = Path(environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(environ.get("HF_HUB_CACHE") or home / "hub")
    repository = hub / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / "main"
    if folder.is_absolute() or not reference.is_file():
        return None
    snapshot = repository / "snapshots" / reference.read_text().strip()
    return snapshot if (snapshot / file).is_file() else None

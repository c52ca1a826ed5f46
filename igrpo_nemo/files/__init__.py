"""What everybody needs of a file system and of a text: used by every room, imports none.

atomic: files that are whole or absent. scrub: configs and logs without secrets.
display_text: data that is safe to print. Here: the folder for what is kept between runs.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where what may be made again is kept: `IGRPO_CACHE_DIR`, or `igrpo-nemo` in the user's cache
    folder (`${XDG_CACHE_HOME:-~/.cache}/igrpo-nemo`). It need not exist yet."""
    if named := os.environ.get("IGRPO_CACHE_DIR"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "igrpo-nemo"

"""Finds NeMo-RL for the tests of this folder (0.7.0, or what NEMO_RL_SRC names), and says what is
missing without it."""

from __future__ import annotations

import os
import sys
import typing
from pathlib import Path

import typing_extensions

DEFAULT_SOURCE = Path.home() / ".cache" / "igrpo-nemo" / "nemo-rl-0.7.0"
SOURCE = Path(os.environ.get("NEMO_RL_SRC", DEFAULT_SOURCE))
MISSING = (
    f"there is no NeMo-RL in {SOURCE}, nor one to import: set NEMO_RL_SRC to the source tree of "
    "v0.7.0, or of its main"
)


def find() -> bool:
    """Puts the source on the path of this process and of the ones that it starts."""
    if (SOURCE / "nemo_rl").is_dir():
        sys.path.insert(0, str(SOURCE))
    elif SOURCE != DEFAULT_SOURCE:
        return False  # another one would not be what was asked for
    try:
        import nemo_rl.package_info  # noqa: F401
    except ImportError:
        return False
    return True


if sys.version_info < (3, 12):
    # pydantic, through which NeMo-RL reads its configs, refuses the standard one before 3.12.
    typing.TypedDict = typing_extensions.TypedDict  # type: ignore[misc]

FOUND = find()

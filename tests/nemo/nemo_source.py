"""Finds NeMo-RL 0.7.0 for the tests of this folder, and says what is missing without it."""

from __future__ import annotations

import os
import sys
import typing
from pathlib import Path

import typing_extensions

DEFAULT_SOURCE = Path.home() / ".cache" / "igrpo-nemo" / "nemo-rl-0.7.0"
MISSING = (
    "NeMo-RL 0.7.0 is neither importable nor found: set NEMO_RL_SRC to its source tree, or put it "
    f"in {DEFAULT_SOURCE}"
)


def find() -> bool:
    """Puts the source on the path of this process and of the ones that it starts."""
    source = Path(os.environ.get("NEMO_RL_SRC", DEFAULT_SOURCE))
    if (source / "nemo_rl").is_dir():
        sys.path.insert(0, str(source))
    try:
        import nemo_rl.package_info  # noqa: F401
    except ImportError:
        return False
    return True


if sys.version_info < (3, 12):
    # pydantic, through which NeMo-RL reads its configs, refuses the standard one before 3.12.
    typing.TypedDict = typing_extensions.TypedDict  # type: ignore[misc]

FOUND = find()

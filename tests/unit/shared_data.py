"""Real data for tests: the folder beside the checkout, or `IGRPO_SHARED_DATA`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("IGRPO_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))


def shared_file(name: str) -> Path:
    """The path of a shared file; skips the test where the folder is absent."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"{name} is not at hand: put it in {FOLDER} or set IGRPO_SHARED_DATA")
    return path


def shared_rows(name: str) -> list[dict]:
    return [json.loads(line) for line in shared_file(name).read_text().splitlines()]

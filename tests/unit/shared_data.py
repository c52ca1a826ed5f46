"""Real data for tests: files of `IGRPO_DATA_DIR`, or of the folder that stands in for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from igrpo_nemo.data.catalog import local_folder

FOLDER = local_folder()


def shared_file(name: str) -> Path:
    """The path of a shared file; skips the test without it, always with the same line."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip("real data is not at hand: IGRPO_DATA_DIR names its folder")
    return path


def shared_rows(name: str) -> list[dict]:
    return [json.loads(line) for line in shared_file(name).read_text().splitlines()]

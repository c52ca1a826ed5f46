"""Marks by folder: what needs a host (`nemo`, `skills`, `slurm`), and whole runs (`slow`)."""

from __future__ import annotations

import pytest

MARKS = {"nemo": "nemo", "skills": "skills", "slurm": "slurm", "e2e": "slow"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if mark := MARKS.get(item.path.parent.name):
            item.add_marker(mark)

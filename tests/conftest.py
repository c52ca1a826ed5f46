"""Marks by folder: what needs a host (`nemo`, `skills`, `slurm`), and whole runs (`slow`).

Test processes and what they start take one thread each, and leave out slow optional imports
(`processes/sitecustomize.py`).
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest

MARKS = {"nemo": "nemo", "skills": "skills", "slurm": "slurm", "e2e": "slow"}
PROCESSES = Path(__file__).parent / "processes"

runpy.run_path(str(PROCESSES / "sitecustomize.py"))
paths = [str(PROCESSES), *filter(None, [os.environ.get("PYTHONPATH")])]
os.environ["PYTHONPATH"] = os.pathsep.join(paths)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if mark := MARKS.get(item.path.parent.name):
            item.add_marker(mark)

"""Fixtures of the end-to-end tests; the runs themselves are in `command_line`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import CommandLine, InProcess


@pytest.fixture(scope="session")
def warmup_cache(tmp_path_factory) -> Path:
    """One for all processes of this session: the small model is warmed up once."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"


@pytest.fixture
def igrpo(tmp_path, monkeypatch, capfd, warmup_cache) -> InProcess:
    return InProcess(tmp_path, monkeypatch, capfd, warmup_cache)


@pytest.fixture
def process(tmp_path, warmup_cache) -> Iterator[CommandLine]:
    """The same folder as `igrpo`'s."""
    processes = CommandLine(tmp_path, warmup_cache)
    yield processes
    processes.close()

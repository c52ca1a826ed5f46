"""Fixtures of the end-to-end tests; the runs themselves are in `command_line`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import CommandLine, InProcess


@pytest.fixture(scope="session")
def warmup_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def igrpo(tmp_path, monkeypatch, capfd, warmup_cache) -> InProcess:
    return InProcess(tmp_path, monkeypatch, capfd, warmup_cache)


@pytest.fixture
def process(tmp_path, warmup_cache) -> Iterator[CommandLine]:
    """The same folder as `igrpo`'s."""
    processes = CommandLine(tmp_path, warmup_cache)
    yield processes
    processes.close()

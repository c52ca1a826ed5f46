"""Fixtures of the end-to-end tests; the runs themselves are in `command_line`."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import CommandLine


@pytest.fixture(scope="session")
def warmup_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def igrpo(tmp_path, warmup_cache) -> CommandLine:
    return CommandLine(tmp_path, warmup_cache)

"""Fixtures of the tests that run the real NeMo-Skills; they skip where its source is absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from skills_environment import WHY_NOT, has_source, make_environment

from igrpo_nemo.evaluation.skills.program import SkillsEnvironment, find_environment


@pytest.fixture(autouse=True)
def no_python_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """NeMo-Skills is another environment: what the tests of NeMo-RL put there is not for it."""
    monkeypatch.delenv("PYTHONPATH", raising=False)


@pytest.fixture(scope="session")
def skills() -> SkillsEnvironment:
    """NeMo-Skills' environment."""
    if not has_source():
        pytest.skip(WHY_NOT)
    return find_environment({**os.environ, "NEMO_SKILLS_ENV": str(make_environment())})


@pytest.fixture
def skills_shell(skills: SkillsEnvironment, monkeypatch: pytest.MonkeyPatch) -> SkillsEnvironment:
    """The same, with a shell whose scripts find it."""
    monkeypatch.setenv("NEMO_SKILLS_ENV", str(Path(skills.bin).parent))
    return skills

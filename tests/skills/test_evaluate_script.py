"""pipelines/evaluate.py before it evaluates anything, with a stand-in for NeMo-Skills."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from skills_runs import CHECKOUT


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, in a checkout without runs."""
    path = CHECKOUT / "pipelines" / "evaluate.py"
    spec = importlib.util.spec_from_file_location("evaluate_script", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CHECKOUT", tmp_path / "checkout")
    programs = tmp_path / "skills" / "bin"
    programs.mkdir(parents=True)
    for name in ("ns", "python"):
        (programs / name).write_text("#!/bin/sh\necho 0.7.0\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("NEMO_SKILLS_ENV", str(programs.parent))
    return module


def test_a_dry_run_trains_no_demo(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[Path] = []
    monkeypatch.setattr("igrpo_nemo.chain.evaluation._train", trained.append)
    assert script.main(["--demo", "--dry-run"]) == 0
    assert "a short one would be trained first" in capsys.readouterr().out
    assert not trained and not script.CHECKOUT.exists()

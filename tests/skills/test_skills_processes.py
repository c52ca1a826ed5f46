"""Commands in files of their own, ended with all that they started."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from skills_environment import REQUIREMENTS

from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.skills import program
from igrpo_nemo.evaluation.skills.evaluate import check_alone
from igrpo_nemo.evaluation.skills.program import (
    ServerDied,
    child_environ,
    find_environment,
    processes_with,
    run_logged,
    without_secrets,
)

SLEEPER = "import time; time.sleep(120)"


def test_output_and_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('said'); sys.exit(3)"]
    log = tmp_path / "logs" / "ns.log"
    assert run_logged(command, log, cwd=tmp_path, environ=os.environ) == 3
    assert log.read_text() == "said\n"


def test_a_dead_server_ends_all_that_was_started(tmp_path: Path, monkeypatch) -> None:
    """NeMo-Skills' commands run in sessions of their own: a signal to a group would miss them."""
    monkeypatch.setattr(program, "SILENT_S", 1.5)
    monkeypatch.setattr(program, "POLL_S", 0.1)
    mark = f"mark-{os.getpid()}-{time.time_ns()}"
    script = (
        "import subprocess, sys; "
        f"subprocess.run([sys.executable, '-c', '{SLEEPER}', '{mark}'], start_new_session=True)"
    )
    seen: list[int] = []
    with pytest.raises(ServerDied):
        run_logged(
            [sys.executable, "-c", script],
            tmp_path / "ns.log",
            cwd=tmp_path,
            environ=os.environ,
            alive=lambda: bool(seen.extend(processes_with(mark))),
        )
    assert seen and not processes_with(mark)


def test_a_process_of_an_earlier_call_keeps_the_folder(tmp_path: Path) -> None:
    check_alone(tmp_path)
    word = f"++output_file={tmp_path}/eval-results/toy/output-rs0.jsonl"
    left = subprocess.Popen([sys.executable, "-c", SLEEPER, word])
    try:
        with pytest.raises(UserError, match=f"process {left.pid} of an earlier call still"):
            check_alone(tmp_path)
        check_alone(tmp_path / "other")
    finally:
        left.kill()
        left.wait()
    check_alone(tmp_path)


def test_where_nemo_skills_is_looked_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("IGRPO_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="set NEMO_SKILLS_ENV"):
        find_environment({"PATH": "/nowhere"})
    with pytest.raises(UserError, match=r"NEMO_SKILLS_ENV=\S+ has no bin/ns"):
        find_environment({"NEMO_SKILLS_ENV": str(tmp_path), "PATH": os.environ["PATH"]})
    folder = tmp_path / "env" / "bin"
    folder.mkdir(parents=True)
    for name, text in (("ns", "exit 0"), ("python", "echo 0.7.1")):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    for environ in ({"NEMO_SKILLS_ENV": str(folder.parent)}, {"VENV": str(folder.parent)}):
        found = find_environment({**environ, "PATH": os.environ["PATH"]})
        assert found.bin == folder and found.version == "0.7.1"
        assert found.version_warning is None
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "ns").symlink_to(folder / "ns")
    paths = os.pathsep.join([str(tmp_path / "links"), os.environ["PATH"]])
    assert find_environment({"PATH": paths}).bin == folder
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="curl is not found"):
        find_environment({"NEMO_SKILLS_ENV": str(folder.parent), "PATH": str(tmp_path / "empty")})
    (folder / "python").write_text("#!/bin/sh\necho 'ModuleNotFoundError: no' >&2; exit 1\n")
    with pytest.raises(UserError, match="does not run: ModuleNotFoundError: no"):
        find_environment({"NEMO_SKILLS_ENV": str(folder.parent), "PATH": os.environ["PATH"]})
    monkeypatch.setattr(program, "PROBE_S", 0.1)
    (folder / "python").write_text("#!/bin/sh\nexec sleep 5\n")
    with pytest.raises(UserError, match="does not run: its Python said nothing within 0 s"):
        find_environment({"NEMO_SKILLS_ENV": str(folder.parent), "PATH": os.environ["PATH"]})
    (folder / "python").unlink()
    with pytest.raises(UserError, match="does not run: cannot start .*python: No such file"):
        find_environment({"NEMO_SKILLS_ENV": str(folder.parent), "PATH": os.environ["PATH"]})


def test_the_docs_install_what_the_tests_run_with() -> None:
    page = Path(__file__).parents[2] / "docs" / "evaluation.md"
    lines = page.read_text(encoding="utf-8").splitlines()
    pins = {re.split("[<>=[]", word)[0]: word for word in REQUIREMENTS}
    (install,) = [shlex.split(line) for line in lines if "pip install git+" in line]
    # What NeMo-Skills itself leaves open; the rest of the environment's pins are its own.
    assert install[3:] == [
        f"{name}<{pins[name].rpartition('<')[2]}" for name in ("mcp", "typer", "leptonai")
    ]


def test_what_a_command_inherits() -> None:
    environ = {"PATH": "/bin", "HF_TOKEN": "secret", "http_proxy": "http://proxy", "A": "b"}
    child = child_environ(Path("/env/bin"), environ)
    assert child["PATH"] == "/env/bin:/bin" and child["A"] == "b"
    assert "127.0.0.1" in child["NO_PROXY"] and "127.0.0.1" in child["no_proxy"]
    assert child["HF_TOKEN"] == "secret"
    assert "secret" not in without_secrets(child).values()

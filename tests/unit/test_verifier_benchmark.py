"""The verifier's benchmark says what its file must hold, and reads such a file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from igrpo_nemo.config.compose import builtin_config_dir

BENCHMARK = builtin_config_dir().parent / "benchmarks" / "verifier.py"


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The benchmark, with a folder of data sets that holds nothing of its own."""
    return subprocess.run(
        [sys.executable, str(BENCHMARK), *words],
        env={"IGRPO_DATA_DIR": str(folder), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_a_file_it_says_which_it_wants(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert "give a FILE" in line and "answer, code (list of completions), score" in line
    assert str(tmp_path) not in line


def test_a_file_of_these_columns_is_measured(tmp_path: Path) -> None:
    row = {"answer": "2", "code": ["so \\boxed{2}", "\\boxed{3}"], "score": [True, False]}
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(row) + "\n")
    done = run(tmp_path, str(file), "--workers", "1", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["completions"], result["agreement"]) == (2, 1.0)

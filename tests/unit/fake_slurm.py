"""Slurm's commands as small scripts on PATH: they note how they were called, and answer."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAM = """\
#!{python}
import json, os, sys
folder = {folder!r}
name = os.path.basename(sys.argv[0])
with open(os.path.join(folder, name + ".calls"), "a") as file:
    file.write(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]) + "\\n")
answers = json.load(open(os.path.join(folder, name + ".answers")))
code, out, err = answers[0]
if len(answers) > 1:
    json.dump(answers[1:], open(os.path.join(folder, name + ".answers"), "w"))
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


@dataclass(frozen=True)
class Call:
    words: list[str]
    folder: Path
    environ: dict[str, str]


class FakeSlurm:
    """`sbatch` and `squeue` that answer what they are told, the last answer for ever."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers("sbatch", "101\n", "102\n", "103\n")
        self.answers("squeue", "")
        for name in ("sbatch", "squeue"):
            path = folder / name
            path.write_text(PROGRAM.format(python=sys.executable, folder=str(folder)))
            path.chmod(0o755)

    def answers(self, name: str, *texts: str) -> None:
        self._write(name, [(0, text, "") for text in texts])

    def refuses(self, name: str, *errors: str, after: tuple[str, ...] = ()) -> None:
        lines = "".join(f"{name}: error: {line}\n" for line in errors)
        self._write(name, [*((0, text, "") for text in after), (1, "", lines)])

    def calls(self, name: str) -> list[Call]:
        path = self.folder / f"{name}.calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [Call(words, Path(cwd), env) for words, cwd, env in map(json.loads, lines)]

    def _write(self, name: str, answers: list[tuple[int, str, str]]) -> None:
        (self.folder / f"{name}.answers").write_text(json.dumps(answers))


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    folder = tmp_path_factory.mktemp("bin")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return FakeSlurm(folder)


@pytest.fixture
def no_slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path_factory.mktemp("empty")))


def squeue_line(number: int, state: str, name: str = "x", **fields: str) -> str:
    """A line as `igrpo_nemo.cluster.client` asks squeue for."""
    keys = {"reason": "None", "elapsed": "1:00", "left": "2:00", "start": "N/A", "nodes": "n1"}
    values = {**keys, **fields}
    return "|".join([str(number), state, *values.values(), name]) + "\n"

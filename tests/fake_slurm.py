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
import fcntl, json, os, sys
folder, name = {folder!r}, os.path.basename(sys.argv[0])
path = os.path.join(folder, name)
lock = open(os.path.join(folder, "lock"), "w")
fcntl.flock(lock, fcntl.LOCK_EX)  # several may be sent at the same time
scripts = [word for word in sys.argv[1:] if word.endswith(".sh") and os.path.isfile(word)]
script = open(scripts[0]).read() if scripts else ""
with open(path + ".calls", "a") as file:
    file.write(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ), script]) + "\\n")
answers = json.load(open(path + ".answers"))
code, out, err = answers[0]
if len(answers) > 1:
    json.dump(answers[1:], open(path + ".answers", "w"))
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


@dataclass(frozen=True)
class Call:
    """One call: its words, where it was made, its variables, and the text of the script in it."""

    words: list[str]
    folder: Path
    environ: dict[str, str]
    script: str


class FakeSlurm:
    """`sbatch`, `squeue` and `sacct` in `folder`, which belongs on PATH: they answer what they are
    told, the last answer for ever. By itself sbatch numbers its jobs from 101 on, and the queue is
    empty."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers("sbatch", *(f"{number}\n" for number in range(101, 200)))
        for name in ("squeue", "sacct"):
            self.answers(name, "")
        for name in ("sbatch", "squeue", "sacct"):
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
        return [Call(words, Path(cwd), *rest) for words, cwd, *rest in map(json.loads, lines)]

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

"""Data that NeMo-Skills prepares itself: some of it comes with it, the rest it downloads.

names --`ns prepare_data`--> files in its own package folder, believed once they are there
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.skills.benchmarks import BENCHMARKS, benchmark_named
from igrpo_nemo.evaluation.skills.environment import SkillsEnvironment, child_environ
from igrpo_nemo.evaluation.skills.processes import run_logged

_WHERE = "import nemo_skills, pathlib; print(pathlib.Path(nemo_skills.__file__).parent / 'dataset')"


def prepared_by_skills(
    names: Sequence[str], environment: SkillsEnvironment, environ: Mapping[str, str]
) -> dict[str, Path]:
    """Lets NeMo-Skills prepare the benchmarks, and returns their files.

    A file of an earlier preparation is removed first: a failed download leaves it, and exits with
    0. Raises `UserError` naming a benchmark that NeMo-Skills does not know or did not get.
    """
    child = child_environ(environment.bin, environ)
    files = {name: _file(name, environment, child) for name in names}
    for file in files.values():
        file.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "ns.log"
        child["NEMORUN_HOME"] = scratch
        command = [str(environment.ns), "prepare_data", *names]
        run_logged(command, log, cwd=Path(scratch), environ=child)
        for name, file in files.items():
            if not file.is_file() or not file.stat().st_size:
                raise UserError(f"NeMo-Skills did not get {name}: {_reason(log)}")
    return files


def _file(name: str, environment: SkillsEnvironment, child: Mapping[str, str]) -> Path:
    asked = subprocess.run(
        [str(environment.python), "-c", _WHERE], env=dict(child), capture_output=True, text=True
    )
    folder = Path(asked.stdout.strip()) / name
    if asked.returncode or not (folder / "prepare.py").is_file():
        known = ", ".join(BENCHMARKS)
        raise UserError(
            f"NeMo-Skills knows no benchmark {name}: name one such as {known}, or give {name}=FILE"
        )
    return folder / f"{benchmark_named(name).split}.jsonl"


def _reason(log: Path) -> str:
    """The last line that names an error, else the last one at all."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return " ".join((errors or lines or ["it said nothing"])[-1].split())[-200:]

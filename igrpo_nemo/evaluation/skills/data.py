"""Evaluation data: the benchmarks, and their checked rows in the layout that NeMo-Skills reads.

    names --`ns prepare_data`--> files in NeMo-Skills' own folder, believed once they are there
    those, or JSONL of any known shape --checked_rows--> rows
        --write_benchmark--> DIR/<bench>/{__init__.py,test.jsonl}
        --freeze--> OUT/data/<bench>/, the copy that an evaluation reads

NeMo-Skills exits with 0 after a failed download: only rows that were counted are believed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from igrpo_nemo.config import Config
from igrpo_nemo.config.igrpo_keys import Evaluation
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.results import json_lines
from igrpo_nemo.evaluation.skills.program import (
    SkillsEnvironment,
    child_environ,
    last_line,
    python_says,
    run_logged,
)
from igrpo_nemo.files.atomic import write_atomic

Row = dict[str, Any]
Kind = Literal["math", "multichoice"]
DEFAULT_SAMPLES = 8
DATA_FILE = "test.jsonl"

_FOLDER = "import nemo_skills, pathlib as p; print(p.Path(nemo_skills.__file__).parent / 'dataset')"
_PROMPTS = {"math": "generic/math", "multichoice": "eval/aai/mcq-{choices}choices"}
"""NeMo-Skills' prompt for each kind."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark, as benchmarks.yaml describes it. Without `rows` its size is not known."""

    name: str
    kind: Kind = "math"
    rows: int | None = None
    integer_answers: bool = False
    choices: int | None = None
    split: str = "test"


_FACTS = yaml.safe_load(Path(__file__).with_name("benchmarks.yaml").read_text(encoding="utf-8"))
BENCHMARKS = {name: Benchmark(name, **values) for name, values in _FACTS.items()}


@dataclass(frozen=True, slots=True)
class BenchmarkData:
    """A prepared benchmark: its rows, and a hash of the file that tells two versions apart."""

    name: str
    path: Path
    rows: tuple[Row, ...]
    sha256: str


def benchmark_named(name: str) -> Benchmark:
    """A known benchmark, or one of math problems whose data is the user's own."""
    return BENCHMARKS.get(name) or Benchmark(name)


def with_benchmarks(config: Config, text: str | None) -> Config:
    """The config with the benchmarks of `--benchmarks aime24:64,gsm8k` alone.

    Without a number a benchmark keeps the config's, or gets eight samples.
    """
    if text is None:
        return config
    keys = config.igrpo.evaluation
    chosen: dict[str, int] = {}
    for word in text.split(","):
        name, colon, samples = word.strip().partition(":")
        if colon and not (samples.isdecimal() and int(samples) > 0):
            raise UserError(f"--benchmarks {word}: write NAME or NAME:K with K of 1 or more")
        chosen[name] = int(samples) if colon else keys.benchmarks.get(name, DEFAULT_SAMPLES)
    try:
        checked = Evaluation.model_validate({**keys.model_dump(), "benchmarks": chosen})
    except ValueError as error:
        raise UserError(f"--benchmarks {text}: no benchmark has such a name") from error
    return config.replaced("igrpo", evaluation=checked)


def default_data_folder(environ: Mapping[str, str]) -> Path:
    """Where prepared data lies unless a command says otherwise."""
    return Path(environ.get("NEMO_SKILLS_DATA_DIR") or "data/eval")


def rows_of_file(path: Path) -> list[Row]:
    """Rows with `problem` and `expected_answer` from a file of problems.

    A file that has those columns keeps all its others; of any other shape (a `question`, an
    `answer` behind `####`, a solution with a box), question and answer are taken.
    """
    from igrpo_nemo.data import DataSpec, load_problems
    from igrpo_nemo.data.rows import read_file

    rows = read_file(path)
    if all("problem" in row and "expected_answer" in row for row in rows):
        return rows
    spec = DataSpec(dataset_name="jsonl", data_path=str(path), drop_unusable=False)
    return [
        {"id": problem.id, "problem": problem.question, "expected_answer": problem.answer}
        for problem in load_problems(spec)
    ]


def checked_rows(benchmark: Benchmark, rows: Sequence[Mapping[str, Any]], where: str) -> list[Row]:
    """The rows, validated, with answers as text.

    Raises `UserError` naming `where` for a wrong number of rows, a row without a problem or an
    answer, an answer of the wrong kind, and, in data of your own, a problem that occurs twice.
    """
    if not rows:
        raise UserError(f"{where} has no rows")
    if benchmark.rows is not None and len(rows) != benchmark.rows:
        raise UserError(
            f"{where} has {len(rows)} rows, but {benchmark.name} has {benchmark.rows}: "
            "get it again, or prepare the data under another name"
        )
    checked: list[Row] = []
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        here = f"{where}, row {number}"
        problem = row.get("problem")
        if not isinstance(problem, str) or not problem.strip():
            raise UserError(f"{here} has no problem: a row needs `problem` and `expected_answer`")
        if problem in seen and benchmark.rows is None:
            raise UserError(f"{here} repeats the problem of row {seen[problem]}")
        seen[problem] = number
        checked.append({**row, "expected_answer": _answer(benchmark, row, here)})
    return checked


def _answer(benchmark: Benchmark, row: Mapping[str, Any], here: str) -> str:
    answer = row.get("expected_answer")
    known = isinstance(answer, str | int | float) and not isinstance(answer, bool)
    text = str(answer).strip() if known else ""
    if not text:
        raise UserError(f"{here} has no expected_answer")
    if benchmark.kind == "multichoice" and text not in row:
        raise UserError(f"{here}: the answer {text} is none of its options")
    if not benchmark.integer_answers:
        return text
    if not re.fullmatch(r"[+-]?\d+(\.0*)?", text):
        raise UserError(f"{here}: the answer {text} is no integer, as {benchmark.name}'s are")
    return str(int(text.partition(".")[0]))


def write_benchmark(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """`folder/<name>/`, as NeMo-Skills reads it. The rows are those of `checked_rows`."""
    kind, where = benchmark_named(name).kind, folder / name
    prompt = _PROMPTS[kind].format(choices=benchmark_named(name).choices)
    module = (
        f'DATASET_GROUP = "{kind}"\n'
        f'METRICS_TYPE = "{kind}"\n'
        f'GENERATION_ARGS = "++prompt_config={prompt} ++eval_type={kind}"\n'
    )
    where.mkdir(parents=True, exist_ok=True)
    write_atomic(where / DATA_FILE, json_lines(rows))
    write_atomic(where / "__init__.py", module.encode("ascii"))
    return where / DATA_FILE


def read_benchmark(folder: Path, name: str) -> BenchmarkData:
    """A prepared benchmark, validated again. Raises `UserError` saying how to prepare it."""
    where, path = folder / name, folder / name / DATA_FILE
    if not path.is_file() or not (where / "__init__.py").is_file():
        raise UserError(
            f"{where} holds no data: prepare it with "
            f"`python pipelines/prepare_data.py --out {folder} {name}`"
        )
    try:
        content = path.read_bytes()
        rows = [json.loads(line) for line in content.splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): prepare it again") from error
    checked = checked_rows(benchmark_named(name), rows, str(path))
    return BenchmarkData(name, path, tuple(checked), hashlib.sha256(content).hexdigest()[:16])


def freeze(data: Sequence[BenchmarkData], out: Path) -> Path:
    """Copies the benchmarks into an evaluation's folder: it reads this copy and nothing else.

    Without a container NeMo-Skills looks for a data folder in the working directory, by its name.
    """
    folder = out / "data"
    for one in data:
        (folder / one.name).mkdir(parents=True, exist_ok=True)
        for file in (DATA_FILE, "__init__.py"):
            shutil.copyfile(one.path.parent / file, folder / one.name / file)
    return folder


def prepared_by_skills(
    names: Sequence[str], environment: SkillsEnvironment, environ: Mapping[str, str]
) -> dict[str, Path]:
    """Lets NeMo-Skills prepare the benchmarks, and returns their files.

    A file of an earlier preparation is removed first: a failed download leaves it, and exits with
    0. Raises `UserError` naming a benchmark that NeMo-Skills does not know or did not get.
    """
    child = child_environ(environment.bin, environ)
    folder = Path(python_says(environment.bin, _FOLDER, environ))
    for name in names:
        if not (folder / name / "prepare.py").is_file():
            raise UserError(
                f"NeMo-Skills knows no benchmark {name}: name one such as {', '.join(BENCHMARKS)}, "
                f"or give {name}=FILE"
            )
    files = {name: folder / name / f"{benchmark_named(name).split}.jsonl" for name in names}
    for file in files.values():
        file.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "ns.log"
        child["NEMORUN_HOME"] = scratch
        command = [environment.ns, "prepare_data", *names]
        run_logged(command, log, cwd=Path(scratch), environ=child)
        for name, file in files.items():
            if not file.is_file() or not file.stat().st_size:
                reason = last_line(log, "Error")
                raise UserError(f"NeMo-Skills did not get {name}: {reason[-200:]}")
    return files

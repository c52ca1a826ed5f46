"""Prepares evaluation data as NeMo-Skills reads it: DIR/<benchmark>/{__init__.py,test.jsonl}.

    prepare_data.py aime24 aime25 gsm8k     through `ns prepare_data`: bundled or downloaded
    prepare_data.py math-500=math500.jsonl  from a file of yours
    prepare_data.py mine=problems.jsonl     a benchmark of your own
    prepare_data.py eval=general            the benchmarks of a config (default: eval=paper)

Rows are counted and answers checked, wherever they come from. docs/evaluation.md says more.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from igrpo_nemo.chain.script import DONE, ScriptParser, exit_code
from igrpo_nemo.config import load_config
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.skills.data import (
    benchmark_named,
    checked_rows,
    default_data_folder,
    prepared_by_skills,
    rows_of_file,
    write_benchmark,
)
from igrpo_nemo.evaluation.skills.program import find_environment

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")


def main(words: Sequence[str]) -> int:
    parser = ScriptParser(__doc__, "prepare_data.py [--out DIR] [NAME | NAME=FILE | eval=NAME ...]")
    out = default_data_folder(os.environ)
    parser.add_argument("--out", type=Path, metavar="DIR", default=out, help=f"DIR ({out})")
    parser.add_argument("sources", nargs="*", metavar="NAME[=FILE]", help="benchmarks")
    flags = parser.parse_args(list(words))
    sources = _sources(flags.sources)
    wanted = [name for name, file in sources.items() if file is None]
    files = {name: Path(file) for name, file in sources.items() if file is not None}
    if wanted:
        files |= prepared_by_skills(wanted, find_environment(os.environ), os.environ)
    for name, file in files.items():
        rows = checked_rows(benchmark_named(name), rows_of_file(file), str(file))
        written = write_benchmark(flags.out, name, rows)
        print(f"{name}: {len(rows):,} problems, {written}")
    return DONE


def _sources(words: Sequence[str]) -> dict[str, str | None]:
    """Benchmark -> its file, None for one that NeMo-Skills prepares; the config's without words."""
    groups = [word for word in words if word.startswith("eval=")]
    names = [word for word in words if word not in groups]
    if groups or not names:
        config = load_config(["policy.model_name=none", *groups])
        names += [name for name in config.igrpo.evaluation.benchmarks if name not in names]
    sources: dict[str, str | None] = {}
    for word in names:
        name, equals, file = word.partition("=")
        if not _NAME.fullmatch(name) or (equals and not file):
            raise UserError(f"cannot read {word!r}: write NAME or NAME=FILE, such as aime24")
        if name in sources:
            raise UserError(f"{name} is named twice")
        sources[name] = file if equals else None
    return sources


if __name__ == "__main__":
    sys.exit(exit_code(main))

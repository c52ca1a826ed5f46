"""Trains a study's cells in parallel processes; finished ones are kept, so a study goes on.

The processes are forked from one that has imported everything, which saves each ten seconds. They
have one thread (or as many as their config says) and their output in `train.log`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from igrpo_nemo.by_path import function_at
from igrpo_nemo.errors import UserError
from igrpo_nemo.files.atomic import write_atomic
from igrpo_nemo.report.runs import load_run
from igrpo_nemo.study.grid import Cell

IGRPO = "igrpo_nemo.cli.entry:main"
"""The command line, from which each process begins."""
MARK = "study.json"
"""Beside a run: which settings it has, and the CPU seconds that it took."""


def train_cells(cells: Sequence[Cell], processes: int, say: Callable[[str], None]) -> None:
    """Trains what is not finished yet, `processes` at a time.

    Raises `UserError` where a folder holds a run with other settings, before anything starts, and
    for the first run that fails, once those beside it are done.
    """
    missing = unfinished(cells)
    if len(missing) < len(cells):
        say(f"{len(cells) - len(missing)} of {len(cells)} runs are finished already")
    started = time.monotonic()
    with ThreadPoolExecutor(processes) as threads:
        runs = {threads.submit(_train, cell): cell for cell in missing}
        try:
            for done, run in enumerate(as_completed(runs), start=1):
                run.result()
                cell = runs[run]
                left_s = (time.monotonic() - started) / done * (len(missing) - done)
                name = f"{cell.task}, {cell.arm}, seed {cell.seed}"
                say(f"{done}/{len(missing)} {name}: {_outcome(cell)}  ETA {left_s / 60:.0f} min")
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def unfinished(cells: Sequence[Cell]) -> list[Cell]:
    """The cells whose runs are not done; new ones are marked with their settings.

    Raises `UserError` where a folder holds a run with other settings.
    """
    return [cell for cell in cells if not _is_finished(cell)]


def cpu_seconds(cells: Sequence[Cell]) -> float:
    """CPU seconds of all runs so far, with the warm-ups that they waited for."""
    return sum(_mark(cell)["cpu_s"] for cell in cells)


def _is_finished(cell: Cell) -> bool:
    if not (cell.folder / MARK).is_file():
        cell.folder.mkdir(parents=True, exist_ok=True)
        _set_mark(cell, {"overrides": cell.overrides, "cpu_s": 0.0})
    if _mark(cell)["overrides"] != list(cell.overrides):
        raise UserError(
            f"{cell.folder} holds a run with other settings: remove it or use another --out"
        )
    return cell.is_finished


def _mark(cell: Cell) -> dict[str, Any]:
    return json.loads((cell.folder / MARK).read_text(encoding="utf-8"))


def _set_mark(cell: Cell, content: dict[str, Any]) -> None:
    write_atomic(cell.folder / MARK, json.dumps(content))


def _train(cell: Cell) -> None:
    log = cell.folder / "train.log"
    words = ["train", *cell.overrides, f"logger.log_dir={cell.folder}"]
    process = _PROCESSES.Process(target=_run, args=(IGRPO, words, log, cell.folder / MARK))
    process.start()
    process.join()
    if process.exitcode:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise UserError(
            f"training ended with exit code {process.exitcode} ({log}): {' '.join(last)}"
        )


_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["igrpo_nemo.local.trainer"])


def _run(command: str, words: list[str], log: Path, mark: Path) -> None:
    """Runs a command in this process: its output goes to `log`, its CPU seconds to `mark`."""
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    code = function_at(command)(words)
    content = json.loads(mark.read_text(encoding="utf-8"))
    of_run = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    used = [resource.getrusage(who) for who in of_run]
    content["cpu_s"] += sum(usage.ru_utime + usage.ru_stime for usage in used)
    write_atomic(mark, json.dumps(content))
    raise SystemExit(code)


def _outcome(cell: Cell) -> str:
    run = load_run(cell.folder)
    start, end = run.accuracy("start"), run.accuracy("end")
    if start is None or end is None:
        raise UserError(f"{cell.folder} has no held-out accuracy: leave validation on")
    return f"{start:.1%} -> {end:.1%}"

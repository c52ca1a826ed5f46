"""How fast the accuracy reward is, against a plain math-verify loop on the same completions.

    python benchmarks/verifier.py [FILE.jsonl] [--workers N] [--repeats R] [--scaling] [--json]

Both sides run on the same completions, once, with the same number of worker processes, in one run
of this command; CPU seconds are user + system of every process that works (callers included),
after math-verify has been imported and warmed up, by the same calls, on both sides. The plain loop
parses the completion, parses the reference and verifies, for each completion, as RL frameworks do.
Each row of the file has the reference in `answer`, a list of completions in `code`, and their
labels (true or false) in `score`. No such file is shipped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igrpo_nemo.data.catalog import local_folder
from igrpo_nemo.rewards import ScoreRequest
from igrpo_nemo.rewards.pool import VerifierPool
from igrpo_nemo.rewards.units import WORDS
from igrpo_nemo.types import Problem

DEFAULT_FILE = "completions_math_qwen_100x8.jsonl"
"""Looked for in `IGRPO_DATA_DIR`."""

COLUMNS = "JSONL with the columns answer, code (list of completions), score (list of labels)"


@dataclass(frozen=True, slots=True)
class Item:
    gold: str
    completion: str
    label: bool


@dataclass(frozen=True, slots=True)
class Timing:
    correct: list[bool]
    cpu_s: float
    wall_s: float


def read_items(path: Path) -> list[Item]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        Item(str(row["answer"]), completion, bool(label))
        for row in rows
        for completion, label in zip(row["code"], row["score"], strict=True)
    ]


def warm_plain(_: int = 0) -> int:
    for gold, answer in WORDS["warm_up"]:
        plain_verdict(Item(gold, f"so $\\boxed{{{answer}}}$", False))
    time.sleep(0.2)  # So that every worker of the plain pool takes one of these.
    return os.getpid()


def plain_verdict(item: Item) -> tuple[bool, float]:
    """The plain loop's body: the verdict, and the CPU seconds it took."""
    import math_verify

    start = time.process_time()
    prediction = math_verify.parse(item.completion)
    gold = math_verify.parse(f"\\boxed{{{item.gold}}}")
    correct = bool(math_verify.verify(gold, prediction))
    return correct, time.process_time() - start


def run_plain(items: Sequence[Item], workers: int) -> Timing:
    """math-verify per completion in `workers` processes; only the loop's body is charged."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(warm_plain, range(workers * 2), chunksize=1)
        start = time.perf_counter()
        results = pool.map(plain_verdict, items)
        wall_s = time.perf_counter() - start
    return Timing([correct for correct, _ in results], sum(cpu for _, cpu in results), wall_s)


def tree_cpu_s(pool: VerifierPool) -> float:
    """CPU seconds so far of this process and of the pool's processes, ended ones included."""
    total = time.process_time()
    for pid in pool.process_ids():
        process = Path(f"/proc/{pid}")
        # Nanoseconds on a core; the tick counts beside it are too coarse for milliseconds of work.
        total += int((process / "schedstat").read_text().split()[0]) / 1e9
        ended_children = (process / "stat").read_text().rpartition(")")[2].split()[13:15]
        total += sum(map(int, ended_children)) / os.sysconf("SC_CLK_TCK")
    return total


def run_pool(items: Sequence[Item], workers: int) -> Timing:
    """The project's verifier: everything in the caller and in the workers is charged."""
    requests = [
        ScoreRequest(Problem(str(i), "", x.gold), x.completion) for i, x in enumerate(items)
    ]
    with VerifierPool(workers=workers) as pool:
        pool.warm_up()
        cpu, start = tree_cpu_s(pool), time.perf_counter()
        verdicts = pool.verdicts(requests)
        wall_s = time.perf_counter() - start
        return Timing([v.correct for v in verdicts], tree_cpu_s(pool) - cpu, wall_s)


def scaling(workers: Sequence[int], count: int = 500) -> list[dict[str, float]]:
    """Completions per second that need SymPy, each of them new, by number of workers.

    On a machine that others use too, look at `completions_per_cpu_second` (it must not fall with
    the workers) and `caller_share`, the calling process's part of all CPU time, whose inverse
    bounds how far more workers help.
    """
    rows = []
    for n in workers:
        requests = [
            ScoreRequest(Problem(str(i), "", f"x^2 + {i}x + 1"), f"\\boxed{{1 + {i}x + x^2}}")
            for i in range(count)
        ]
        with VerifierPool(workers=n, group_deadline_s=600.0) as pool:
            pool.warm_up()
            own, cpu, start = time.process_time(), tree_cpu_s(pool), time.perf_counter()
            verdicts = pool.verdicts(requests)
            wall_s = time.perf_counter() - start
            own, cpu = time.process_time() - own, tree_cpu_s(pool) - cpu
        assert all(verdict.correct for verdict in verdicts)
        rows.append(
            {
                "workers": n,
                "completions_per_s": count / wall_s,
                "completions_per_cpu_second": count / cpu,
                "caller_share": own / cpu,
            }
        )
    return rows


def measure(items: Sequence[Item], workers: int, repeats: int) -> dict[str, Any]:
    """The best of `repeats` for each side, taken in turns, so that both meet the same machine."""
    plain: list[Timing] = []
    ours: list[Timing] = []
    for _ in range(repeats):
        plain.append(run_plain(items, workers))
        ours.append(run_pool(items, workers))
    best_plain = min(plain, key=lambda timing: timing.cpu_s)
    best_ours = min(ours, key=lambda timing: timing.cpu_s)
    labels = [item.label for item in items]
    return {
        "completions": len(items),
        "workers": workers,
        "speedup": best_plain.cpu_s / best_ours.cpu_s,
        "completions_per_cpu_second": len(items) / best_ours.cpu_s,
        "plain_completions_per_cpu_second": len(items) / best_plain.cpu_s,
        "agreement": _agreement(best_ours.correct, labels),
        "plain_agreement": _agreement(best_plain.correct, labels),
        "wall_speedup": best_plain.wall_s / best_ours.wall_s,
    }


def _agreement(verdicts: Sequence[bool], labels: Sequence[bool]) -> float:
    return sum(a == b for a, b in zip(verdicts, labels, strict=True)) / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help=COLUMNS)
    parser.add_argument(
        "--workers",
        type=int,
        default=min(2, os.cpu_count() or 1),
        metavar="N",
        help="processes of each side (%(default)s)",
    )
    parser.add_argument(
        "--repeats", type=int, default=1, metavar="R", help="runs, of which the best counts (1)"
    )
    parser.add_argument("--scaling", action="store_true", help="also measure 1..cores workers")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    file = arguments.file or local_folder() / DEFAULT_FILE
    if not file.exists():
        missing = f"{file} is not there" if arguments.file else "give a FILE of completions"
        parser.error(f"{missing}: {COLUMNS}")
    result = measure(read_items(file), arguments.workers, arguments.repeats)
    if arguments.scaling:
        result["scaling"] = scaling(range(1, (os.cpu_count() or 1) + 1))
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:34s} {value:.4g}" if isinstance(value, float) else f"{name:34s} {value}")


if __name__ == "__main__":
    main()

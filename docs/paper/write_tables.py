"""The tables in docs/paper/*.md, from the published figures and from the preflight.

    python docs/paper/write_tables.py      writes the tables of every page again

A table stands between `<!-- published: EXPERIMENT ... -->` or `<!-- preflight: EXPERIMENT ... -->`
and `<!-- end -->`, in the order of the experiments that are named there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from igrpo_nemo.config import load_config
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.systems import published_results
from igrpo_nemo.preflight import Plan, preflight
from igrpo_nemo.preflight.memory import GIB

BLOCK = re.compile(
    r"(?P<open><!-- (?P<kind>published|preflight): (?P<names>[^>]*?) -->\n)"
    r".*?(?P<close><!-- end -->)",
    re.DOTALL,
)
BENCHMARKS = {
    "aime25": "AIME25",
    "aime24": "AIME24",
    "math-500": "MATH500",
    "amc23": "AMC23",
    "gsm8k": "GSM8K",
    "minerva_math": "Minerva",
    "gpqa": "GPQA",
    "mmlu-pro": "MMLU-Pro",
}
"""Benchmarks in the paper's order, and how the pages call them."""


PAGES = sorted(Path(__file__).parent.glob("*.md"))


def shipped(experiment: str) -> Plan:
    """The plan of an experiment as it is shipped, whatever this machine holds."""
    return preflight(load_config([f"experiment={experiment}"]), environ={})


def rewritten(
    text: str,
    kinds: Sequence[str] = ("published", "preflight"),
    plan_of: Callable[[str], Plan] = shipped,
) -> str:
    """A page with its tables made anew."""

    def block(match: re.Match[str]) -> str:
        names = match["names"].split()
        if match["kind"] not in kinds:
            return match[0]
        published = match["kind"] == "published"
        table = published_table(names) if published else preflight_table(map(plan_of, names))
        return f"{match['open']}{table}{match['close']}"

    return BLOCK.sub(block, text)


def published_table(experiments: Sequence[str]) -> str:
    """The published rows: only the columns that one of them has."""
    rows = [published_results(experiment) for experiment in experiments]
    shown = [name for name in BENCHMARKS if any(name in row.benchmarks for row in rows)]
    head = ["experiment", *(BENCHMARKS[name] for name in shown), "average"]
    recomputed = any(row.recomputed is not None for row in rows)
    cells = []
    for row in rows:
        figures = [row.benchmarks.get(name) for name in shown] + [row.average]
        figures += [row.recomputed] if recomputed else []
        cells.append([f"`{row.experiment}`", *map(_percent, figures)])
    return _table([*head, "of the columns"] if recomputed else head, cells)


def preflight_table(plans: Iterable[Plan]) -> str:
    """What experiments need and cost. Raises `UserError` for one that does not fit."""
    head = [
        "experiment",
        "GPUs",
        "steps",
        "hours",
        "GPU-hours",
        "GiB of a training GPU",
        "longest sequences at once in an engine",
    ]
    return _table(head, map(_row, plans))


def _row(plan: Plan) -> list[str]:
    experiment = Path(plan.config.logger.log_dir).name
    if plan.problems:
        raise UserError(f"{experiment}: {plan.problems[0]}")
    values = plan.to_dict()
    cost = values["cost"]
    return [
        f"`{experiment}`",
        f"{cost['gpus']}",
        f"{cost['steps']:,}",
        f"{cost['hours']:.1f}",
        f"{cost['gpu_hours']:,.0f}",
        f"{values['training_memory']['total'] / GIB:.0f}",
        f"{values['vllm_memory']['longest_at_once']:,}",
    ]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, ["---"] * len(head), *rows])


def main() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = rewritten(text)
        if new != text:
            page.write_text(new, encoding="utf-8")
            print(f"wrote {page}")


if __name__ == "__main__":
    main()

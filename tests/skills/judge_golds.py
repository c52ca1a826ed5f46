"""Run by NeMo-Skills' own Python: its math evaluator on replies, as `ns eval` calls it.

stdin: [{"eval_config": {...}, "replies": [[gold, reply], ...]}, ...]; stdout: a verdict a reply.
"""

from __future__ import annotations

import asyncio
import json
import sys


async def verdicts(evaluator, replies: list[list[str]]) -> list[bool]:
    rows = [{"expected_answer": gold, "generation": reply} for gold, reply in replies]
    return [bool((await evaluator.eval_single(row))["symbolic_correct"]) for row in rows]


def main() -> None:
    out, sys.stdout = sys.stdout, sys.stderr
    from nemo_skills.evaluation.evaluator import get_evaluator_class  # type: ignore

    found = []
    for asked in json.load(sys.stdin):
        evaluator = get_evaluator_class("math", asked["eval_config"])
        found.append(asyncio.run(verdicts(evaluator, asked["replies"])))
    json.dump(found, out)


if __name__ == "__main__":
    main()

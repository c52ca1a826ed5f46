"""A task without mathematics and its reward: the completion must be a JSON object with the right
fields.

    python examples/custom_reward.py records.jsonl      writes 200 rows to train on

docs/rewards.md has the command that trains on them. A row has a question, an answer and whatever
columns its reward reads:

    {"problem": "Ann has 3 red pens. ...", "answer": "Ann", "record": {"name": "Ann", "count": 3}}
"""

import json
import random
import sys
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from igrpo_nemo.types import Problem

NAMES = ("Ann", "Ben", "Eva", "Tom")
COLORS = ("red", "blue", "green")


def score(problem: Problem, completion: str, columns: dict[str, Any]) -> dict[str, float]:
    """0.2 for one JSON object and nothing else, up to 0.6 for its right fields, and up to 0.2 for
    a text like the right one: what a weak model can begin to learn from."""
    record = columns["record"]
    like = 0.2 * SequenceMatcher(None, completion, json.dumps(record)).ratio()
    try:
        said = json.loads(completion)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        return {"like": like, "json": 0.0, "fields": 0.0}
    right = sum(said.get(name) == value for name, value in record.items())
    return {"like": like, "json": 0.2, "fields": 0.6 * right / max(len(record), len(said))}


def row(rng: random.Random) -> dict[str, Any]:
    record = {"name": rng.choice(NAMES), "count": rng.randrange(2, 10), "color": rng.choice(COLORS)}
    return {
        "problem": "{name} has {count} {color} pens. As JSON with name, count, color?".format(
            **record
        ),
        "answer": record["name"],
        "record": record,
    }


if __name__ == "__main__":
    rng = random.Random(0)
    lines = [json.dumps(row(rng)) + "\n" for _ in range(200)]
    Path(sys.argv[1]).write_text("".join(lines), encoding="utf-8")

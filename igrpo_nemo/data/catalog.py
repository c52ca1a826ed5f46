"""The data sets known by name: where their rows are, and how to read question and answer.

A named set is looked for as a local file first (in the folder `IGRPO_DATA_DIR`), then on the hub.
A name that is not here is a path or a hub id.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from igrpo_nemo.errors import UserError

QUESTION_KEYS = ("problem", "question", "input", "prompt", "query")
ANSWER_KEYS = ("answer", "expected_answer", "output", "target", "gt", "ground_truth", "solution")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a named set lies.

    `splits` maps a split to its local file names (any of them); `hub` is the id, with `subset` and
    `hub_splits` where the hub's names differ. `evaluation` sets keep every row: a benchmark is
    scored whole. `usable` counts the problems of a split that are left once references are checked,
    where that was measured.
    """

    name: str
    splits: dict[str, tuple[str, ...]]
    hub: str | None = None
    subset: str | None = None
    hub_splits: dict[str, str] = field(default_factory=dict)
    question_key: str = "problem"
    answer_key: str = "answer"
    evaluation: bool = False
    usable: dict[str, int] = field(default_factory=dict)
    about: str = ""


_SOURCES = (
    Source(
        "math",
        {"train": ("math_train_7500.jsonl",)},
        hub="DigitalLearningGmbH/MATH-lighteval",
        answer_key="solution",
        usable={"train": 7_493},
        about="MATH train, 7,500 problems (arXiv 2103.03874); answer: the solution's last box",
    ),
    Source(
        "gsm8k",
        {"train": ("gsm8k_train.jsonl",), "test": ("gsm8k_test.jsonl",)},
        hub="openai/gsm8k",
        subset="main",
        question_key="question",
        usable={"train": 7_473},
        about="GSM8K, 7,473 + 1,319 problems (arXiv 2110.14168); answer: behind `####`",
    ),
    Source(
        "acereason_math",
        {"train": ("acereason_math.jsonl",)},
        hub="nvidia/AceReason-Math",
        about="AceReason-Math, 49,585 problems (arXiv 2505.16400)",
    ),
    Source(
        "openr1_math",
        {"train": ("openr1_math_220k.jsonl",)},
        hub="open-r1/OpenR1-Math-220k",
        subset="default",
        about="OpenR1-Math-220k, its default part of 94k problems",
    ),
    Source(
        "math500",
        {"test": ("math500.jsonl",)},
        hub="HuggingFaceH4/MATH-500",
        evaluation=True,
        about="the 500 held-out MATH problems of arXiv 2305.20050",
    ),
    Source(
        "aime24",
        {"test": ("aime24_skills.jsonl", "aime24.jsonl")},
        hub="math-ai/aime24",
        answer_key="expected_answer",
        evaluation=True,
        about="AIME 2024 I and II, 30 problems",
    ),
    Source(
        "aime25",
        {"test": ("aime25.jsonl",)},
        hub="math-ai/aime25",
        evaluation=True,
        about="AIME 2025 I and II, 30 problems",
    ),
    Source(
        "amc23",
        {"test": ("amc23.jsonl",)},
        hub="math-ai/amc23",
        evaluation=True,
        about="AMC 12 2023, 40 problems",
    ),
    Source(
        "minerva_math",
        {"test": ("minerva_math_deepseek_ocw.jsonl", "minerva_math.jsonl")},
        hub="math-ai/minervamath",
        evaluation=True,
        about="Minerva's 272 OpenCourseWare problems (arXiv 2206.14858)",
    ),
)
SOURCES = {source.name: source for source in _SOURCES}
_ALIASES = {
    "nvidia/acereason-math": "acereason_math",
    "acereason-math": "acereason_math",
    "open-r1/openr1-math-220k": "openr1_math",
    "openr1-math-220k": "openr1_math",
    "openai/gsm8k": "gsm8k",
    "minerva": "minerva_math",
}
EVALUATION_SETS = ("aime24", "aime25", "math500", "amc23", "gsm8k", "minerva_math")


def find_source(name: str) -> Source | None:
    """The named set, or None where `name` is a path or another hub id."""
    key = name.lower()
    return SOURCES.get(_ALIASES.get(key, key))


def source_of_file(path: str) -> Source | None:
    """The named set that a local file is, going by its name: its columns are then known."""
    name = Path(path).name
    for source in _SOURCES:
        if any(name in files for files in source.splits.values()):
            return source
    return None


def local_folders() -> list[Path]:
    """Folders in which files of named sets are looked for, first to last."""
    beside = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    named = os.environ.get("IGRPO_DATA_DIR")
    return [Path(named).expanduser()] if named else [beside]


def default_split(source: Source) -> str:
    return next(iter(source.splits))


def locate(source: Source, split: str | None) -> Path | None:
    """The local file of a split, or None where it is on the hub only. UserError: no such split."""
    split = split or default_split(source)
    if split not in source.splits:
        raise UserError(
            f"the data set {source.name} has no split {split!r}: it has {', '.join(source.splits)}"
        )
    for folder in local_folders():
        for name in source.splits[split]:
            if (folder / name).is_file():
                return folder / name
    return None

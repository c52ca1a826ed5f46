"""NeMo-Skills' own evaluator finds every gold answer right, in both profiles."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from igrpo_nemo.evaluation.skills.command import generation_config_dir
from igrpo_nemo.evaluation.skills.data import benchmark_named, checked_rows, rows_of_file
from igrpo_nemo.evaluation.skills.program import SkillsEnvironment

pytestmark = pytest.mark.timeout(1800)

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[2] / "shared" / "data"
FILES = {"aime24": "aime24_skills.jsonl", "math-500": "math500.jsonl"}


def golds() -> list[str]:
    """The answers of both benchmarks, as the pipeline would write them."""
    folder = Path(os.environ.get("IGRPO_DATA_DIR", SHARED))
    found = []
    for name, file in FILES.items():
        if not (folder / file).is_file():
            pytest.skip(f"{file} is not at hand: set IGRPO_DATA_DIR to the folder that has it")
        rows = checked_rows(benchmark_named(name), rows_of_file(folder / file), file)
        found += [row["expected_answer"] for row in rows]
    return found


def judged(
    skills: SkillsEnvironment, asked: dict[str, tuple[dict, list[list[str]]]]
) -> dict[str, list[bool]]:
    """Name -> the verdicts of NeMo-Skills' evaluator under a config on [gold, reply]."""
    questions = [{"eval_config": config, "replies": replies} for config, replies in asked.values()]
    done = subprocess.run(
        [skills.python, HERE / "judge_golds.py"],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(asked, json.loads(done.stdout), strict=True))


def eval_config(name: str) -> dict:
    return yaml.safe_load((generation_config_dir() / f"{name}.yaml").read_text())["eval_config"]


def test_golds_are_right_and_the_pattern_is_read_as_ours(skills: SkillsEnvironment) -> None:
    answers = golds()
    assert len(answers) == 530
    boxed, tags = r"<think>hm</think>So it is $\boxed{%s}$.", "hm</think><answer>%s</answer>"

    def replies(form: str) -> list[list[str]]:
        wrong = [[gold, form % f"{gold}+1"] for gold in answers[:30]]
        return [*([gold, form % gold] for gold in answers), *wrong]

    opened = [
        ["4", r"<answer>9</answer></think>\boxed{9} <answer>4</answer>"],
        ["4", r"perhaps \boxed{4} or <answer>4</answer>"],  # never closed
        ["4", "<answer>4</answer>"],
    ]
    verdicts = judged(
        skills,
        {
            "boxed": ({}, replies(boxed)),
            "answer_tags": (eval_config("answer_tags"), replies(tags)),
            "opened": (eval_config("answer_tags_opened"), opened),
        },
    )
    assert verdicts.pop("opened") == [True, False, True]
    for rights in verdicts.values():
        wrong = [gold for gold, right in zip(answers, rights[:530], strict=True) if not right]
        assert not wrong
        assert not any(rights[530:])

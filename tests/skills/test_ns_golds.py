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


def judged(skills: SkillsEnvironment, config: dict, replies: list[list[str]]) -> list[bool]:
    done = subprocess.run(
        [skills.python, HERE / "judge_golds.py"],
        input=json.dumps({"eval_config": config, "replies": replies}),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_thinking_that_the_template_opened(skills: SkillsEnvironment) -> None:
    """NeMo-Skills reads the pattern as `answer_pattern` does, cut off or not."""
    file = generation_config_dir() / "answer_tags_opened.yaml"
    config = yaml.safe_load(file.read_text())["eval_config"]
    replies = [
        ["4", r"<answer>9</answer></think>\boxed{9} <answer>4</answer>"],
        ["4", r"perhaps \boxed{4} or <answer>4</answer>"],  # never closed
        ["4", "<answer>4</answer>"],
    ]
    assert judged(skills, config, replies) == [True, False, True]


@pytest.mark.parametrize("profile", ["answer_tags", "boxed"])
def test_golds_are_right(profile: str, skills: SkillsEnvironment) -> None:
    answers = golds()
    assert len(answers) == 530
    if profile == "boxed":
        config, form = {}, r"<think>hm</think>So it is $\boxed{%s}$."
    else:
        file = generation_config_dir() / "answer_tags.yaml"
        config, form = (
            yaml.safe_load(file.read_text())["eval_config"],
            "hm</think><answer>%s</answer>",
        )
    replies = [[gold, form % gold] for gold in answers]
    replies += [[gold, form % f"{gold}+1"] for gold in answers[:30]]
    verdicts = judged(skills, config, replies)
    wrong = [gold for gold, right in zip(answers, verdicts[:530], strict=True) if not right]
    assert not wrong
    assert not any(verdicts[530:])

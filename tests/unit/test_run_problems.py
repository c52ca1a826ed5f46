"""The problems of a run: what is held out, and what is left out and said."""

import json

import pytest
from composed import load_config

from igrpo_nemo.errors import UserError
from igrpo_nemo.prompts import PromptBuilder, PromptProfile, TokenBudget
from igrpo_nemo.run.problems import fitting_problems, training_problems, validation_problems
from igrpo_nemo.types import Problem


def config_of(tmp_path, rows, *words):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["data=jsonl", f"data.train.data_path={file}", "data.validation=null"]
    return load_config(["policy.model_name=x", *data, *words])


def test_a_share_of_the_training_problems_stands_in_for_a_validation_set(tmp_path):
    rows = [{"problem": f"{i}+1=", "answer": str(i + 1)} for i in range(40)]
    config = config_of(tmp_path, rows, "data.train.split_validation_size=0.25")
    train, held_out = training_problems(config), validation_problems(config)
    assert len(train) == 30 and len(held_out) == 10
    assert not {p.id for p in train} & {p.id for p in held_out}
    assert held_out == validation_problems(config)


def test_rows_that_are_dropped_are_told_by_reason(tmp_path):
    rows = [
        {"problem": "1+1=", "answer": "2"},
        {"problem": "", "answer": "3"},
        {"problem": "1"},
        {"problem": "1+2=", "answer": "3"},
    ]
    config = config_of(tmp_path, rows, "data.train.split_validation_size=0.1")
    told = "rows.jsonl: 2 of 4 rows are left out: 1 no_answer, 1 no_question"
    with pytest.warns(UserWarning, match=told):
        assert len(training_problems(config)) == 1


def test_problems_that_are_too_long_are_told(tokenizer):
    prompts = PromptBuilder(tokenizer, PromptProfile("", "", "draft"), TokenBudget(100, 20))
    problems = [Problem("a", "1+1=", "2"), Problem("b", "1+" * 100, "2")]
    with pytest.raises(UserError, match="problem b: its prompt has"):
        fitting_problems(problems, prompts, drop_overlong=False)
    told = "1 of 2 problems are left out: their prompts have more than 80 tokens"
    with pytest.warns(UserWarning, match=told):
        assert fitting_problems(problems, prompts, drop_overlong=True) == problems[:1]
    with pytest.raises(UserError, match="1 of 1 problems are left out: .*; raise policy.max_total"):
        fitting_problems(problems[1:], prompts, drop_overlong=True)
    with pytest.raises(UserError, match="half of a surrogate pair"):
        fitting_problems([Problem("c", "\udfff", "2")], prompts, drop_overlong=True)

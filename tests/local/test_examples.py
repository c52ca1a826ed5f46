"""The examples and the snippets of docs/python.md run, and show what the engine does."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch

from igrpo_nemo.config import load_config
from igrpo_nemo.local import trainer
from igrpo_nemo.local.learner import Learner
from igrpo_nemo.local.model import save_pretrained_folder
from igrpo_nemo.local.warmup import build_small_model
from igrpo_nemo.objectives.surrogate import SurrogateConfig
from igrpo_nemo.rewards import ScoreRequest
from igrpo_nemo.run.core import scorer_of
from igrpo_nemo.run.tokenizer import build_small_tokenizer
from igrpo_nemo.types import Completion, Problem, Stage, StopReason, TrainingRow

FOLDER = Path(__file__).parents[2] / "examples"


PAGE = FOLDER.parent / "docs" / "python.md"


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def minimal():
    return example("minimal_igrpo")


def test_its_update_is_the_engines(minimal):
    tokenizer = build_small_tokenizer(["some text"], 262)
    shape = tiny_runs.SHAPE.model_copy(update={"initializer_range": 0.2})
    start = build_small_model(shape, tokenizer, context=64, seed=1)
    rows = [
        TrainingRow(str(n // 4), Stage.REFINE, (3 + n // 4, 5, 7), completion, float(n % 3))
        for n in range(8)
        for completion in [Completion("", tuple(range(9, 10 + n)), (), StopReason.EOS)]
    ]
    here, there = copy.deepcopy(start), copy.deepcopy(start)
    minimal.update(here, torch.optim.SGD(here.parameters(), lr=0.1), rows, SurrogateConfig())
    optimizer = torch.optim.SGD(there.parameters(), lr=0.1)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    config = load_config(["experiment=demo", "policy.max_grad_norm=1.0"])
    Learner(there, optimizer, constant, config).update(rows)
    moved = 0.0
    for a, b, c in zip(here.parameters(), there.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
        moved += float((a - c).detach().abs().sum())
    assert moved > 0.1


def test_it_runs(minimal, monkeypatch, capsys):
    few = ["--steps", "1", "--problems", "2", "--warmup-steps", "2"]
    monkeypatch.setattr(sys, "argv", ["minimal_igrpo.py", *few])
    minimal.main()
    assert capsys.readouterr().out.startswith("step   1: drafts")


def test_a_reward_of_ones_own_trains_on_its_rows(tmp_path, monkeypatch):
    """`custom_reward.py`: JSON in the place of mathematics, from a file of rows to an update."""
    monkeypatch.syspath_prepend(FOLDER)
    rows = tmp_path / "records.jsonl"
    subprocess.run([sys.executable, FOLDER / "custom_reward.py", rows], check=True)
    policy = tiny_runs.tiny_policy(tmp_path / "policy")
    keys = [key for key in tiny_runs.TASK if not key.startswith("data.")]
    keys += ["data=jsonl", f"data.train.data_path={rows}", f"data.validation.data_path={rows}"]
    keys += ["igrpo.reward.accuracy=0", "igrpo.reward.format=0", "grpo.max_num_steps=3"]
    keys += ["igrpo.reward.custom={custom_reward:score: 1.0}", f"logger.log_dir={tmp_path}/run"]
    keys += [f"policy.model_name={policy}", "policy.max_total_sequence_length=256"]
    keys += ["data.max_input_seq_length=96"]
    assert trainer.train(load_config(keys)) == 0
    steps = tiny_runs.learned(tmp_path / "run")
    assert len(steps) == 3
    for metrics in steps:
        assert 0 < metrics["reward/score"] < 0.2
        assert metrics["reward/score/like"] == pytest.approx(metrics["reward/score"])
        assert metrics["reward/score/failed"] == metrics["reward/score/json"] == 0
        assert metrics["igrpo/nonzero_advantage_groups"] > 0
        assert metrics["igrpo/best_draft_reward"] > metrics["igrpo/draft_reward"]


def test_it_rewards_the_right_fields(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    (score,) = scorer_of(
        load_config(
            [
                *("experiment=demo", "env.math.num_workers=0", "igrpo.reward.format=0"),
                "igrpo.reward.custom={custom_reward:score: 1.0}",
            ]
        )
    )([ScoreRequest(Problem("p", "q", "Ann", '{"record": {"n": 1, "m": 2}}'), '{"n": 1, "m": 2}')])
    assert score.reward == pytest.approx(1.0)


def test_it_is_short_enough_to_read():
    assert len((FOLDER / "minimal_igrpo.py").read_text().splitlines()) <= 150


def test_own_data_is_trained_on_and_measured(policy, tmp_path, monkeypatch, capsys):
    data, out = tmp_path / "own problems.jsonl", tmp_path / "a run, mine"
    rows = [{"question": f"{n}+1=", "answer": n + 1} for n in range(14)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    few = ["--steps", "2", "--held-out", "4", "--out", str(out)]
    short = [
        "data.max_input_seq_length=64",
        "policy.max_total_sequence_length=160",
        "policy.generation.max_new_tokens=16",
    ]
    monkeypatch.setattr(sys, "argv", ["own_data.py", str(policy), str(data), *few, *short])
    example("own_data").main()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("held-out accuracy: ")
    assert last.endswith(f"{out}/run/checkpoints/step_00000002/model")
    assert json.loads((out / "run" / "summary.json").read_text())["steps"] == 2
    assert len((out / "run" / "metrics.jsonl").read_text().splitlines()) >= 2
    parts = [(out / f"{name}.jsonl").read_text().splitlines() for name in ("train", "held_out")]
    assert [len(lines) for lines in parts] == [10, 4]


def test_the_snippets_of_the_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = build_small_tokenizer(["<think>12+34=46</think><answer>46</answer>"] * 3, 320)
    model = build_small_model(tiny_runs.SHAPE, tokenizer, context=2048, seed=1)
    save_pretrained_folder(model, tokenizer, tmp_path / "model")
    for name, numbers in {"train": range(8), "held_out": range(8, 11)}.items():
        rows = [{"problem": f"{n}+1=", "answer": str(n + 1)} for n in numbers]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {}
    text = PAGE.read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec"), names)
    assert len(snippets) == 4
    printed = capsys.readouterr().out
    assert str(names["scores"].summary) in printed and str(names["scores"].summary) in text
    assert str(names["result"]) in printed
    assert names["checkpoint"] == Path("runs/mine/checkpoints/step_00000002")
    assert json.loads(names["result"].file.read_text())["held_out"] == names["result"].metrics
    assert Path("runs/mine/finished").read_text() == "2\n"

import json

import pytest
import tiny_runs

from igrpo_nemo.config import load_config
from igrpo_nemo.data.order import Position
from igrpo_nemo.errors import UserError
from igrpo_nemo.feedback import NoFeedback
from igrpo_nemo.local.rollout import collect_batch
from igrpo_nemo.types import Completion, Group, Problem, Prompt, Rollout, Score, Stage, StopReason

COMPLETION = Completion("x", (1,), (-1.0,), StopReason.EOS)


def rollout(name, rewards):
    problem = Problem(name, "q", "a")
    scores = tuple(Score(r) for r in rewards)
    return Rollout(
        problem, Group(problem, Stage.DRAFT, Prompt("q", (1,)), (COMPLETION,) * 2, scores)
    )


def collect(batches, wanted, max_draws=10):
    grpo = load_config(["experiment=demo"]).grpo.model_copy(
        update={
            "use_dynamic_sampling": True,
            "num_prompts_per_step": wanted,
            "dynamic_sampling_max_gen_batches": max_draws,
        }
    )
    draws = ((batch, Position(0, n)) for n, batch in enumerate(batches, start=1))
    return collect_batch(draws, grpo, NoFeedback(2).training_rows)


def test_groups_without_advantage_are_replaced_by_later_ones():
    batch = collect(
        [
            [rollout("a", [1, 1]), rollout("b", [0, 1])],
            [rollout("c", [0, 0]), rollout("d", [2, 1])],
            [rollout("e", [0, 1])],
        ],
        wanted=2,
    )
    assert [r.problem.id for r in batch.rollouts] == ["b", "d"]
    assert [row.group for row in batch.rows] == ["b/draft/0"] * 2 + ["d/draft/0"] * 2
    assert len(batch.sampled) == 4 and batch.draws == 2 and batch.behind == Position(0, 2)


def test_surplus_groups_are_left_out():
    batch = collect([[rollout(str(i), [0, 1]) for i in range(5)]], wanted=3)
    assert [r.problem.id for r in batch.rollouts] == ["0", "1", "2"] and batch.draws == 1


def test_data_that_end_before_the_batch_is_full_give_none():
    assert collect([[rollout("a", [0, 1])]], wanted=2) is None


def test_giving_up_says_what_to_change():
    with pytest.raises(UserError, match="0 of 1 groups .* in 2 batches: raise grpo.dynamic"):
        collect([[rollout("a", [1, 1])]] * 3, wanted=1, max_draws=2)


def test_a_run_ends_with_the_problems_of_its_epochs(tmp_path, capsys):
    """A step draws as many batches as it takes, so that there are fewer steps than batches."""
    policy = tiny_runs.tiny_policy(tmp_path / "policy")
    sampling = [
        "grpo.use_dynamic_sampling=true",
        "grpo.batch_multiplier=1",
        "data.train.num_problems=16",
        "igrpo.num_drafts=6",
        "igrpo.num_refinements=2",  # often without an advantage
        "grpo.val_at_end=true",
        "igrpo.val_draft_conditioned=false",  # only training's rollouts are seen
        "grpo.max_num_steps=1000",
    ]

    def config(epochs):
        run = tmp_path / "run"
        return tiny_runs.tiny_config(policy, run, *sampling, f"grpo.max_num_epochs={epochs}")

    seen = tiny_runs.run(config(2))
    steps = len(tiny_runs.learned(tmp_path / "run"))
    drawn = [rollout.problem.id for rollouts in seen.rollouts for rollout in rollouts]
    assert seen.code == 0 and 0 < steps < 8
    assert len(drawn) == 32 and len(set(drawn)) == 16, "every problem once an epoch"
    assert (tmp_path / "run" / "finished").read_text() == f"{steps}\n"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == steps and summary["val_accuracy_end"] is not None
    assert f"2 epochs are used up after step {steps}" in capsys.readouterr().out

    again = tiny_runs.run(config(2))
    assert again.code == 0 and again.rollouts == [], "there is nothing left to do"
    longer = tiny_runs.run(config(3))
    assert sum(len(rollouts) for rollouts in longer.rollouts) == 16, "the third epoch"
    assert len(tiny_runs.learned(tmp_path / "run")) > steps

import itertools
import json

import pytest
import tiny_runs

from igrpo_nemo.config import load_config
from igrpo_nemo.data.order import Position
from igrpo_nemo.environment import StepReturn
from igrpo_nemo.errors import UserError
from igrpo_nemo.feedback import NextPrompt, NoFeedback
from igrpo_nemo.local import trainer
from igrpo_nemo.local.rollout import TwoStageRollout, collect_batch, shape_rows
from igrpo_nemo.local.sampling import SamplingParams
from igrpo_nemo.run.stop import EXIT_INTERRUPTED, StopRequested
from igrpo_nemo.types import (
    Completion,
    Group,
    Problem,
    Prompt,
    Rollout,
    Score,
    Stage,
    StopReason,
    TrainingRow,
)

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


class Recorder:
    """Sampler and environment in one: keeps the names of draws, and gives two prompts a problem."""

    def __init__(self):
        self.keys = []

    def sample(self, requests, params, on_progress):
        self.keys += [request.seed_key for request in requests]
        return [[COMPLETION] * request.num_samples for request in requests]

    def reset(self, problem):
        return NextPrompt(Prompt("q", (1,)), 2)

    def step(self, stage, attempts, *, step):
        groups = [Group(a.problem, stage, a.prompt, a.completions, ()) for a in attempts]
        following = (NextPrompt(Prompt("q'", (2,)), 1),) * (2 if stage is Stage.DRAFT else 0)
        return [StepReturn(group, None, following, not following) for group in groups]


def test_every_draw_of_a_run_has_a_name_of_its_own():
    """By seed, step, draw, stage, problem and prompt: what is sampled follows from it alone."""
    recorder, problems = Recorder(), [Problem(name, "q", "a") for name in "ab"]
    for seed, step, draw in itertools.product((0, 1), (1, 2), (0, 1)):
        roll_out = TwoStageRollout(recorder, recorder, SamplingParams(1), seed)
        rollouts = roll_out(problems, step=step, draw=draw)
        assert [len(each.refinements) for each in rollouts] == [2, 2]
    assert len(set(recorder.keys)) == len(recorder.keys) == 2 * 2 * 2 * (2 + 4)


def test_rewards_are_scaled_and_then_shaped_by_length():
    cut = Completion("x", (1,) * 95, (-1.0,) * 95, StopReason.LENGTH)
    rows = [TrainingRow("g", Stage.REFINE, (1,), c, 2.0) for c in (COMPLETION, cut)]
    grpo = load_config(["experiment=demo", "objective=dapo"]).grpo
    length = {"max_response_length": 100, "overlong_buffer_length": 10}
    shaping = grpo.reward_shaping.model_copy(update={**length, "overlong_buffer_penalty": 1.0})
    scaling = grpo.reward_scaling.model_copy(update={"source_max": 4.0, "target_max": 1.0})

    def rewards(**shaped):
        keys = {"reward_scaling": scaling, "reward_shaping": shaping.model_copy(update=shaped)}
        return [row.reward for row in shape_rows(rows, grpo.model_copy(update=keys))]

    full = scaling.target_min + (1.0 - scaling.target_min) / 2
    assert rewards() == pytest.approx([full, full - 0.5])
    assert rewards(stop_properly_penalty_coef=0.25) == pytest.approx([full, full / 4])


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


def test_a_run_ends_with_the_problems_of_its_epochs(policy, tmp_path, capsys):
    """A step draws as many batches as it takes, so that there are fewer steps than batches."""
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

    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    consumed = json.loads((newest / "state.json").read_text())["consumed_problems"]
    assert consumed == sum(map(len, seen.rollouts[:steps])) > steps * 4

    again = tiny_runs.run(config(2))
    assert again.code == 0 and again.rollouts == [], "there is nothing left to do"
    longer = tiny_runs.run(config(3))
    assert sum(len(rollouts) for rollouts in longer.rollouts) == 16, "the third epoch"
    assert len(tiny_runs.learned(tmp_path / "run")) > steps


@pytest.mark.parametrize(
    "words",
    [
        ("grpo.max_num_steps=2",),
        # Nobody knows that the second step is the last one.
        ("grpo.max_num_steps=1000", "grpo.max_num_epochs=1", "data.train.num_problems=8"),
    ],
    ids=["steps", "data"],
)
def test_a_last_validation_that_a_stop_ended_is_made_when_the_run_goes_on(
    tmp_path, monkeypatch, words
):
    policy = tiny_runs.tiny_policy(tmp_path / "policy")
    keys = ("grpo.val_at_start=false", "grpo.val_period=0", "grpo.val_at_end=true", *words)
    config = tiny_runs.tiny_config(policy, tmp_path / "run", *keys)

    def stopped(*_):
        raise StopRequested

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "validate", stopped)
        assert tiny_runs.run(config).code == EXIT_INTERRUPTED
    assert tiny_runs.run(config).code == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    logged = [(row["kind"], row["step"]) for row in map(json.loads, lines)]
    assert logged == [("train", 1), ("train", 2), ("val", 2)]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["val_accuracy_end"] is not None
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002" / "state.json"
    assert json.loads(checkpoint.read_text())["extra"]["val_step"] == 2

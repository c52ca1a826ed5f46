import pytest

from igrpo_nemo.errors import UserError
from igrpo_nemo.feedback.none import NoFeedback
from igrpo_nemo.local.dynamic_sampling import collect_groups
from igrpo_nemo.types import Completion, Group, Problem, Prompt, Rollout, Score, Stage, StopReason

COMPLETION = Completion("x", (1,), (-1.0,), StopReason.EOS)


def rollout(name, rewards):
    problem = Problem(name, "q", "a")
    scores = tuple(Score(r) for r in rewards)
    return Rollout(
        problem, Group(problem, Stage.DRAFT, Prompt("q", (1,)), (COMPLETION,) * 2, scores)
    )


def collect(batches, wanted, max_draws=10):
    remaining = iter(batches)
    return collect_groups(
        wanted=wanted,
        max_draws=max_draws,
        roll_out=lambda draw: next(remaining),
        training_rows=NoFeedback(2).training_rows,
    )


def test_groups_without_advantage_are_replaced_by_later_ones():
    batch = collect(
        [
            [rollout("a", [1, 1]), rollout("b", [0, 1])],
            [rollout("c", [0, 0]), rollout("d", [2, 1])],
        ],
        wanted=2,
    )
    assert [r.problem.id for r in batch.rollouts] == ["b", "d"]
    assert [row.group for row in batch.rows] == ["b/draft/0"] * 2 + ["d/draft/0"] * 2
    assert len(batch.sampled) == 4 and batch.draws == 2


def test_surplus_groups_are_left_out():
    batch = collect([[rollout(str(i), [0, 1]) for i in range(5)]], wanted=3)
    assert [r.problem.id for r in batch.rollouts] == ["0", "1", "2"] and batch.draws == 1


def test_giving_up_says_what_to_change():
    with pytest.raises(UserError, match="0 of 1 groups .* in 2 batches: raise grpo.dynamic"):
        collect([[rollout("a", [1, 1])]] * 3, wanted=1, max_draws=2)

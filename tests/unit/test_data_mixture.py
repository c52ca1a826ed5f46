"""Several data sets as one, a set from a function of one's own, and the curriculum's order."""

import json
from collections import Counter

import pytest
from cases import cases

from igrpo_nemo.config import load_config
from igrpo_nemo.config.checks import launch_problems
from igrpo_nemo.data.order import Curriculum, EpochOrder, Position, mixed
from igrpo_nemo.errors import UserError
from igrpo_nemo.metrics import rollout_metrics
from igrpo_nemo.preflight.tokens import questions
from igrpo_nemo.run.problems import expected_problems, training_problems, validation_problems
from igrpo_nemo.types import Problem, Rollout, Selection

CASES = cases(__file__)

HF = "policy.model_name=x/y"


def a_set(name: str, count: int) -> list[Problem]:
    return [Problem(f"{name}/{n}", f"{n}+1=", str(n + 1)) for n in range(count)]


def of_set(problems: list[Problem]) -> Counter[str]:
    return Counter(problem.id.partition("/")[0] for problem in problems)


def test_a_mixture_has_each_set_in_proportion_to_its_weight():
    sets = [a_set("a", 60), a_set("b", 30), a_set("c", 10)]
    problems = mixed(sets, [1, 1, 2], seed=3)
    assert of_set(problems) == {"a": 25, "b": 25, "c": 50}
    assert len({problem.id for problem in problems}) == 100
    assert Counter(p.question for p in problems if p.id.startswith("c")) == {
        f"{n}+1=": 5 for n in range(10)
    }
    assert problems == mixed(sets, [10, 10, 20], seed=3) != mixed(sets, [1, 1, 2], seed=4)
    assert of_set(mixed(sets, [1, 1, 1], seed=0)) == {"a": 34, "b": 33, "c": 33}
    assert mixed(sets, None, seed=0) == [*sets[0], *sets[1], *sets[2]]
    assert [p.id for p in mixed([a_set("a", 1)] * 3, None, seed=0)] == ["a/0", "a/0#2", "a/0#3"]


def test_a_mixture_of_a_file_a_function_and_a_held_out_share(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"problem": f"{n}*2=", "answer": 2 * n}) + "\n" for n in range(40))
    )
    sets = (
        f"{{dataset_name: jsonl, data_path: '{file}', weight: 3, split_validation_size: 0.25}}, "
        "{dataset_name: 'own_data:sums', split: '5', weight: 1}"
    )
    config = load_config([HF, f"data.train=[{sets}]", "data.validation=null"])
    problems, held_out = training_problems(config), validation_problems(config)
    assert of_set(problems) == {"rows": 30, "sums": 10} and of_set(held_out) == {"rows": 10}
    assert problems == training_problems(config)
    assert "5+1=" in {problem.question for problem in problems}
    assert expected_problems(config) is None and questions(config).count is None
    again = load_config([HF, "data.train=[{dataset_name: math}, {dataset_name: gsm8k}]"])
    assert expected_problems(again) == questions(again).count == 7_498 + 7_473


@pytest.mark.parametrize(("sets", "said"), CASES["mixtures"])
def test_a_mixture_that_cannot_be_is_one_line(sets, said):
    with pytest.raises(UserError) as caught:
        load_config([HF, f"data.train={sets}"])
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "said"), CASES["functions"])
def test_a_function_that_gives_no_rows_is_one_line(name, said):
    config = load_config([HF, f"data.train.dataset_name={name}"])
    with pytest.raises(UserError) as caught:
        training_problems(config)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_metrics_name_the_sets_of_a_mixture(make_group):
    def rollout(name, rewards):
        return Rollout(Problem(name, "", ""), make_group(rewards), Selection(0, "best"), ())

    rollouts = [rollout("a/1", [1, 0]), rollout("a/2", [1, 1]), rollout("b/c/7", [0, 0])]
    metrics = rollout_metrics(rollouts, [])
    assert metrics["data/share/a"] == pytest.approx(2 / 3)
    assert (metrics["data/draft_accuracy/a"], metrics["data/draft_accuracy/b/c"]) == (0.75, 0.0)
    assert not [name for name in rollout_metrics(rollouts[:2], []) if name.startswith("data/")]


IDS = [f"p/{n}" for n in range(10)]


def curriculum(keep: float, make_group, solved: dict[int, list[float]], size: int) -> Curriculum:
    found = Curriculum(IDS, keep=keep, batch_size=size, seed=5)
    found.add(
        [
            Rollout(Problem(f"p/{n}", "", ""), make_group(rewards), None, ())
            for n, rewards in solved.items()
        ]
    )
    return found


def test_what_was_always_or_never_solved_is_left_out_of_the_next_epoch(make_group):
    order = curriculum(0.0, make_group, {0: [1, 1], 1: [0, 0], 2: [1, 0]}, 4)
    whole = EpochOrder(10, batch_size=4, seed=5)
    assert order.order(0) == whole.order(0), "nothing is left out of the first epoch"
    assert order.order(1) == [n for n in whole.order(1) if n not in (0, 1)]
    assert order.take(Position(1, 4))[1] == Position(1, 8)
    assert order.take(Position(1, 8))[1] == Position(2, 4)
    assert order.metrics() == {
        "data/left_out": 0.2,
        "data/always_solved": pytest.approx(1 / 3),
        "data/never_solved": pytest.approx(1 / 3),
    }
    all_ends = {n: [1, 1] for n in range(10)}
    assert len(curriculum(0, make_group, all_ends, 4).order(1)) == 4
    some = curriculum(0.5, make_group, all_ends, 4)
    kept = [frozenset(some.order(epoch)) for epoch in range(1, 20)]
    assert len(set(kept)) > 5 and 4 <= min(map(len, kept)) < max(map(len, kept)) <= 10


def test_a_curriculum_goes_on_within_an_epoch_as_if_nothing_had_been(make_group):
    solved = {0: [1, 1], 1: [0, 0]}
    order = curriculum(0.0, make_group, solved, 2)
    expected = list(order.order(1))
    late = [Rollout(Problem("p/3", "", ""), make_group([1, 1]), None, ())]
    order.add(late)
    assert order.order(1) == expected
    state = json.loads(json.dumps(order.state_dict()))
    assert 3 not in order.order(2)
    fresh = Curriculum(IDS, keep=0.0, batch_size=2, seed=5)
    fresh.load_state_dict(state)
    assert fresh.order(1) == expected and 3 not in fresh.order(2)
    # A run that measured nothing has no state, and takes none.
    plain = EpochOrder(10, batch_size=2, seed=5)
    plain.add(late)
    assert plain.state_dict() == plain.metrics() == {}
    fresh.load_state_dict({})
    assert 3 not in fresh.order(2)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("igrpo.draft_prefetch=off", None),
        ("igrpo.draft_prefetch=fused", "is saved with a step, igrpo.draft_prefetch=fused reads"),
        ("grpo.async_grpo={enabled: true}", "grpo.async_grpo.enabled=true reads before"),
    ],
)
def test_where_nemo_rl_has_no_curriculum(option, said):
    words = [HF, "engine=nemo_rl", "cluster=a100_2x8", "igrpo.curriculum_keep=0", option]
    lines = [each for each in launch_problems(load_config(words)) if "curriculum" in each]
    assert [said in line for line in lines] == ([True] if said else [])

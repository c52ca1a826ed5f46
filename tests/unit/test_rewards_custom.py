"""Reward functions of the user's own: in the pool and in process, from config to metrics."""

import json
import warnings
from contextlib import closing
from dataclasses import replace

import pytest

from igrpo_nemo.config import load_config
from igrpo_nemo.data import load_with_report
from igrpo_nemo.data.problems import DataSpec
from igrpo_nemo.metrics import rollout_metrics
from igrpo_nemo.rewards import ScoreRequest, WeightedScorer, build_scorer
from igrpo_nemo.rewards.custom import CustomReward
from igrpo_nemo.run.core import evaluation_scorer, scorer_of
from igrpo_nemo.run.identity import problems_fingerprint
from igrpo_nemo.types import Group, Problem, Prompt, Rollout, Stage

PROBLEM = Problem("p", "q", "abc", json.dumps({"longest": 8}))
BAD = {
    "raise": "line 29: KeyError: 'no such",
    "exit": "SystemExit: done",
    "text": "returned '1.0', which is no finite number",
    "nan": "returned nan",
    "none": "returned None",
    "huge": "which is no finite number",
    "memory": "MemoryError",
}


def _requests(*texts: str) -> list[ScoreRequest]:
    return [ScoreRequest(PROBLEM, text) for text in texts]


def _demo(*overrides: str):
    return load_config(["experiment=demo", *overrides])


@pytest.mark.parametrize("workers", [0, 1])
def test_functions_are_components_with_weights(workers, monkeypatch):
    monkeypatch.setenv("A_TOKEN", "x")
    functions = ("own_rewards:share", "own_rewards:parts", "own_rewards:secret")
    weights = {"accuracy": 1.0, "share": 2.0, "parts": 0.5, "secret": 1.0}
    with closing(build_scorer(weights, workers=workers, functions=functions)) as scorer:
        long, short = scorer(_requests("x" * 8, "abc"))
        assert scorer(_requests("abc", "x" * 8, "abc")) == [short, long, short]
    seen = float(not workers)  # no environment variable of the caller's in the pool
    assert long.reward == 2.0 + seen and short.reward == 2 * 3 / 8 + 0.5 * 1.5 + seen
    assert short.components == {
        "accuracy": 0.0,
        "share": 0.375,
        "share/failed": 0.0,
        "parts": 1.5,
        "parts/short": 1.0,
        "parts/same": 0.5,
        "parts/failed": 0.0,
        "secret": seen,
        "secret/failed": 0.0,
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failure_is_0_counted_and_told_once(workers):
    path = "own_rewards:bad"
    with closing(build_scorer({"bad": 1.0}, functions=[path], workers=workers)) as first:
        for text in BAD:
            own = {"bad": CustomReward(path, first.verifier)}
            scorer = WeightedScorer({"bad": 1.0}, first.verifier, own)
            with pytest.warns(UserWarning) as told:
                failed, fine, again = scorer(_requests(text, "fine", text))
            (line,) = [str(each.message) for each in told]
            assert failed == again and (failed.reward, fine.reward) == (0.0, 1.0)
            assert (failed.components["bad/failed"], fine.components["bad/failed"]) == (1.0, 0.0)
            assert "own_rewards:bad failed" in line and BAD[text] in line and "\n" not in line
            group = Group(PROBLEM, Stage.DRAFT, Prompt("", ()), (), (failed, fine))
            metrics = rollout_metrics([Rollout(PROBLEM, group)], [])
            assert (metrics["reward/bad"], metrics["reward/bad/failed"]) == (0.5, 0.5)


def test_a_function_that_hangs_or_dies_costs_its_completion_alone():
    texts = ("hang", "fine", "die", "x" * 2_000_000)
    with closing(
        build_scorer({"bad": 1.0}, workers=1, item_timeout_s=1.0, functions=["own_rewards:bad"])
    ) as scorer:
        with pytest.warns(UserWarning, match="no result within env.math.item_timeout_s"):
            assert [score.reward for score in scorer(_requests(*texts))] == [0.0, 1.0, 0.0, 1.0]
        assert scorer.metrics()["reward/verifier/timeouts"] == 1


@pytest.mark.parametrize(
    "written",
    ["{own_rewards:share: 2.0, own_rewards:parts: 0}", "{own_rewards:share:2}"],
)
def test_the_config_names_them_and_their_weights(written):
    config = _demo(f"igrpo.reward.custom={written}", "env.math.num_workers=0")
    assert config.igrpo.reward.functions == ("own_rewards:share",)
    assert config.igrpo.reward.best == 4.0
    assert scorer_of(config).weights == {"accuracy": 1.0, "format": 1.0, "share": 2.0}


def test_without_one_the_config_is_as_it_was():
    config = _demo()
    assert "custom" not in config.to_dict()["igrpo"]["reward"]
    assert config.igrpo.reward.weights == {"accuracy": 1.0, "format": 1.0}


def test_other_columns_are_kept_where_they_are_asked_for(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"problem": "q", "answer": "5", "record": {"a": [1, null]}, "n": 2}\n')
    spec = DataSpec(data_path=str(path))
    (bare,), (whole,) = load_with_report(spec)[0], load_with_report(spec, columns=True)[0]
    assert bare.columns == "" and json.loads(whole.columns) == {"record": {"a": [1, None]}, "n": 2}
    assert problems_fingerprint([bare]) != problems_fingerprint([whole])


def test_nothing_is_told_without_a_failure():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_scorer({"share": 1.0}, functions=["own_rewards:share"])(_requests("a"))


def test_an_evaluation_calls_the_functions_too(make_group):
    from igrpo_nemo.evaluation.embedded import _row

    config = _demo("env.math.num_workers=0", "igrpo.reward.custom={own_rewards:share: 2.0}")
    (score,) = evaluation_scorer(config)(_requests("abc"))
    assert score.components["share"] == 3 / 8 and score.reward == 2 * 3 / 8
    row = _row(replace(make_group([0.0]), scores=(score,)), 0.0, 1.0)
    assert row["reward"] == 0.75 and row["rewards"] == {"share": 0.375, "share/failed": 0.0}
    assert "rewards" not in _row(make_group([1.0]), 0.0, 1.0)
    (plain,) = evaluation_scorer(config, functions=False)(_requests("abc"))
    assert list(plain.components) == ["accuracy", "format"]

"""The weighted sum, its components, and what the scorer refuses."""

import pytest

from igrpo_nemo.errors import UserError
from igrpo_nemo.rewards import Scorer, ScoreRequest, build_scorer
from igrpo_nemo.types import Problem

FIVE = Problem("p", "2+3", "5")


def _request(text: str, **flags) -> ScoreRequest:
    return ScoreRequest(FIVE, text, **flags)


def test_the_sum_is_weighted_and_the_components_are_not():
    scorer = build_scorer({"accuracy": 1.0, "format": 0.5})
    scores = scorer(
        [
            _request("<think>a</think><answer>5</answer>"),
            _request("<think>a</think><answer>6</answer>"),
            _request("\\boxed{5}"),
            _request("5"),
        ]
    )
    assert isinstance(scorer, Scorer)
    assert [score.reward for score in scores] == [1.5, 0.5, 1.0, 0.0]
    assert scores[1].components == {"accuracy": 0.0, "format": 1.0}
    assert [score.reason for score in scores] == ["match", "mismatch", "match", "no_answer"]
    assert [score.correct for score in scores] == [True, False, True, False]
    assert scorer([]) == []


def test_an_opened_thinking_part_reaches_both_components():
    scorer = build_scorer()
    inside = _request("it is \\boxed{5}", thinking_open=True)
    closed = _request("a</think><answer>5</answer>", thinking_open=True)
    assert [score.reward for score in scorer([inside, closed])] == [0.0, 2.0]


def test_accuracy_is_reported_where_it_is_not_rewarded():
    scorer = build_scorer({"format": 1.0})
    score = scorer([_request("\\boxed{5}")])[0]
    assert (score.reward, score.correct, scorer.component_names) == (
        0.0,
        True,
        ("accuracy", "format"),
    )


def test_further_components_are_added_by_name():
    def short(requests, verdicts):
        return [1.0 if len(request.text) < 10 else 0.0 for request in requests]

    scorer = build_scorer({"accuracy": 1.0, "short": 0.25}, components={"short": short})
    assert [s.reward for s in scorer([_request("\\boxed{5}"), _request("so: \\boxed{5}")])] == [
        1.25,
        1.0,
    ]


def test_unknown_components_and_no_weights_are_refused():
    with pytest.raises(UserError, match="unknown reward component 'speed'"):
        build_scorer({"speed": 1.0})
    with pytest.raises(UserError, match="at least one weight"):
        build_scorer({})


def test_metrics_are_what_was_counted_since_the_last_call():
    class Counting:
        calls = 0

        def __call__(self, requests, verdicts):
            self.calls += len(requests)
            return [0.0] * len(requests)

        def metrics(self):
            return {"calls": self.calls}

    scorer = build_scorer({"accuracy": 1.0, "judge": 1.0}, components={"judge": Counting()})
    scorer([_request("5")] * 3)
    assert scorer.metrics() == {"reward/judge/calls": 3.0}
    scorer([_request("5")])
    assert scorer.metrics() == {"reward/judge/calls": 1.0}
    assert scorer.metrics() == {"reward/judge/calls": 0.0}

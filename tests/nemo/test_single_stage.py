"""What NeMo-RL's own rollout is described by, where the reward does not tell the accuracy."""

from __future__ import annotations

import nemo_source
import pytest

nemo_source.require()

import torch  # noqa: E402

from igrpo_nemo.environment import StepReturn  # noqa: E402
from igrpo_nemo.feedback import NoFeedback  # noqa: E402
from igrpo_nemo.nemo import single_stage  # noqa: E402
from igrpo_nemo.nemo.seam import RolloutCall, RolloutSpec  # noqa: E402
from igrpo_nemo.types import Group, Score, Stage  # noqa: E402


class Client:
    """In the place of the actor's: an answer is right if it says so."""

    judged: list[bool] = []

    def __init__(self, actor, step_number):
        assert (actor, step_number) == ("actor", 1)

    def step_all(self, stage, attempts, *, judged):
        self.judged.append(judged)
        return [StepReturn(self._group(each), None, (), True) for each in attempts]

    def _group(self, attempt):
        scores = [
            Score(0.0, {"accuracy": float(c.text == "right")}, "verdict")
            for c in attempt.completions
        ]
        return Group(
            attempt.problem, Stage.DRAFT, attempt.prompt, attempt.completions, tuple(scores)
        )


def _batch(texts):
    ids = torch.tensor([1])
    logs = [
        [
            {"role": "user", "content": "q", "token_ids": ids},
            {"role": "assistant", "content": text, "token_ids": ids},
        ]
        for text in texts
    ]
    problem = {"id": "p", "question": "q", "answer": "a"}
    return {
        "message_log": logs,
        "extra_env_info": [{"problem": problem, "thinking_open": False}] * len(texts),
        "task_name": ["igrpo"] * len(texts),
        "loss_multiplier": torch.ones(len(texts)),
        "truncated": torch.zeros(len(texts), dtype=torch.bool),
        "total_reward": torch.tensor([1.0, 2.0]),
        "reward1": torch.tensor([1.0, 1.0]),
        "reward2": torch.tensor([0.0, 1.0]),
    }


def test_accuracy_is_the_verifiers_where_a_judge_is_the_reward(monkeypatch):
    """A well formatted answer that the judge takes for wrong has reward 1, and is not right; the
    judge is not asked again."""
    monkeypatch.setattr(single_stage, "EnvironmentClient", Client)
    spec = RolloutSpec(NoFeedback(2), {"format": 1.0, "judge": 1.0})
    task_to_env = single_stage.SingleStageMap({"igrpo": "actor"}, spec)
    batch = _batch(["wrong", "right"])
    returned, metrics = task_to_env.roll_out(RolloutCall(lambda: (batch, {}), {}, True))
    assert returned is batch
    assert metrics["igrpo/draft_accuracy"] == 0.5
    assert metrics["igrpo/draft_reward"] == pytest.approx(1.5)
    assert metrics["reward/reason/verdict"] == 1.0
    assert Client.judged == [False]

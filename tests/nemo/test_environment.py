"""The environment actor: stages as steps, plain scoring, concurrency, components."""

from __future__ import annotations

import asyncio
import copy
import threading

import nemo_runs
import pytest
import ray
import torch

from igrpo_nemo.environment import Attempt, scored
from igrpo_nemo.nemo import environment
from igrpo_nemo.run import core
from igrpo_nemo.types import Completion, Problem, Prompt, Stage, StopReason

RIGHT = "<think>3</think><answer>3</answer>"
WRONG = "<think>4</think><answer>4</answer>"
PROBLEM = Problem("p", "1+2=", "3")


@pytest.fixture(scope="module")
def settings(policy_folder, tmp_path_factory):
    config = nemo_runs.tiny_config(policy_folder, tmp_path_factory.mktemp("run"))
    return {"config": config.to_dict(), "tokenizer": {"name": policy_folder}}


@pytest.fixture(scope="module")
def worker(settings):
    return environment.TwoStageWorker(settings)


@pytest.fixture(scope="module")
def actor(settings, ray_cluster):
    actor = environment.TwoStageActor.remote(settings)
    yield actor
    ray.kill(actor)


def _completion(text, *, cut=False):
    return Completion(text, (1, 2), (), StopReason.LENGTH if cut else StopReason.EOS)


def _attempt(*texts, problem=PROBLEM):
    prompt = Prompt("q", (1, 2, 3))
    return Attempt(problem, prompt, tuple(_completion(text) for text in texts))


def _info(**more):
    problem = {"id": "p", "question": "1+2=", "answer": "3"}
    return {"problem": problem, "thinking_open": False, **more}


def _log(*texts):
    return [{"role": "user", "content": "q"}, *({"role": "assistant", "content": t} for t in texts)]


def test_without_a_stage_it_scores_the_last_answer(worker):
    """Plain GRPO: weighted components that NeMo-RL adds up; validation: accuracy alone."""
    logs = [_log(RIGHT, WRONG), _log(WRONG, RIGHT)]
    plain = worker.step(logs, [_info(), _info()])
    columns = plain.rewards.values() if isinstance(plain.rewards, dict) else plain.rewards.T
    assert [column.tolist() for column in columns] == [[0, 1], [1, 1]]
    assert plain.terminateds.tolist() == [True, True]
    validation = worker.step(logs, [_info(validation=True)] * 2)
    assert validation.rewards.tolist() == [0, 1]


def _stepped(client, stage, *attempts):
    """All attempts at once, in order."""
    return asyncio.run(_gathered(client, stage, attempts))


async def _gathered(client, stage, attempts):
    return await asyncio.gather(*(client.step(stage, attempt) for attempt in attempts))


def test_the_client_speaks_the_cores_types(actor):
    client = environment.EnvironmentClient(actor, 3)
    attempts = [_attempt(WRONG, RIGHT), _attempt(RIGHT, WRONG, problem=Problem("r", "2+2=", "4"))]
    first, second = _stepped(client, Stage.DRAFT, *attempts)
    assert first.group.rewards == (1.0, 2.0)
    assert second.group.rewards == (1.0, 2.0)
    assert [first.selection.index, second.selection.index] == [1, 1]
    assert first.group.completions is attempts[0].completions
    assert not first.terminated and not second.terminated
    [following], [other] = first.observations, second.observations
    assert RIGHT in following.prompt.text and WRONG in other.prompt.text
    assert following.num_samples == 4
    [tied] = _stepped(client, Stage.DRAFT, _attempt(WRONG, "nothing"))
    assert (tied.selection.index, tied.group.rewards) == (0, (1.0, 0.0))
    assert WRONG in tied.observations[0].prompt.text
    [done] = _stepped(client, Stage.REFINE, _attempt(RIGHT))
    assert done.terminated
    assert done.observations == ()
    assert client.seconds > 0


def test_steps_run_concurrently(actor):
    """Sixty-four steps at once, each with its own answer."""
    client = environment.EnvironmentClient(actor, 1)
    attempts = [
        _attempt(f"<answer>{n}</answer>", problem=Problem(f"p{n}", f"{n}+0=", str(n)))
        for n in range(64)
    ]
    results = _stepped(client, None, *attempts)
    assert [r.group.problem.id for r in results] == [f"p{n}" for n in range(64)]
    assert all(r.group.scores[0].correct for r in results)


def test_validation_asks_no_judge(settings, monkeypatch):
    """Training rows do: nobody answers there."""
    asked = []

    def judge(settings, cache):
        def ask(requests, verdicts):
            asked.extend(request.text for request in requests)
            return [0.5] * len(requests)

        return ask

    monkeypatch.setattr(core, "Judge", judge)
    config = copy.deepcopy(settings["config"])
    config["igrpo"]["reward"]["judge"], config["igrpo"]["judge"] = 1.0, {"model": "m"}
    worker = environment.TwoStageWorker(settings | {"config": config})
    try:
        validated = worker.step([_log(RIGHT), _log(WRONG)], [_info(validation=True)] * 2)
        assert validated.rewards.tolist() == [1.0, 0.0]
        assert asked == []
        measured = worker.grade(None, _attempt(WRONG), 1, judged=False)
        assert not measured.group.scores[0].correct
        assert asked == []
        worker.grade(Stage.REFINE, _attempt(RIGHT), 1)
        assert asked == [RIGHT]
    finally:
        worker.shutdown()


def test_a_function_of_ones_own_rewards_training_rows(settings):
    config = copy.deepcopy(settings["config"])
    config["igrpo"]["reward"] |= {"accuracy": 0.0, "format": 1.0}
    config["igrpo"]["reward"]["custom"] = {"own_rewards:share": 2.0, "own_rewards:bad": 0.5}
    worker = environment.TwoStageWorker(settings | {"config": config})
    problem = {"id": "p", "question": "q", "answer": "3", "columns": '{"longest": 10}'}
    info = {"problem": problem, "thinking_open": False}
    try:
        validated = worker.step([_log(RIGHT), _log("raise")], [info | {"validation": True}] * 2)
        assert validated.rewards.tolist() == [1.0, 0.0]
        with pytest.warns(UserWarning, match="own_rewards:bad failed"):
            returned = worker.step([_log("12345"), _log("raise")], [info] * 2)
        found = returned.rewards
        columns = found.values() if isinstance(found, dict) else found.unbind(dim=1)
        assert sum(columns).tolist() == [2 * 0.5 + 0.5, 2 * 0.5]
        drafts = worker.grade(Stage.DRAFT, _attempt("1", "12345", problem=Problem(**problem)), 1)
        assert drafts.selection.index == 1
    finally:
        worker.shutdown()


def test_rows_of_a_call_are_scored_beside_each_other(worker, monkeypatch):
    """One call of NeMo-RL's brings all rows of a batch."""
    both = threading.Barrier(2, timeout=30)
    score = "igrpo_nemo.environment.scored"

    def waiting(*arguments):
        both.wait()
        return scored(*arguments)

    monkeypatch.setattr(score, waiting)
    returned = worker.step([_log(RIGHT), _log(WRONG)], [_info(validation=True)] * 2)
    assert returned.rewards.tolist() == [1.0, 0.0]


def test_registering_twice_is_harmless():
    from nemo_rl.distributed.ray_actor_environment_registry import get_actor_python_env
    from nemo_rl.environments.utils import ENV_REGISTRY

    environment.register()
    environment.register()
    assert ENV_REGISTRY[environment.ENV_NAME]["actor_class_fqn"] == environment.ACTOR_PATH
    assert get_actor_python_env(environment.ACTOR_PATH)


def test_metrics_over_a_batch(worker):
    batch, metrics = worker.global_post_process_and_metrics(
        {"total_reward": torch.tensor([1.0, 2.0])}
    )
    assert metrics == {"reward": 1.5}
    assert batch["total_reward"].tolist() == [1.0, 2.0]

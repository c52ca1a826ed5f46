"""The seam: who gets which rollout, what is put back, what travels, what is checked."""

from __future__ import annotations

import asyncio
import importlib
import pickle
import threading

import pytest

from igrpo_nemo.config import load_config
from igrpo_nemo.nemo import seam
from igrpo_nemo.nemo.failure import RolloutError
from igrpo_nemo.nemo.names import callers
from igrpo_nemo.nemo.rollout import TrainingMap
from igrpo_nemo.nemo.seam import StepClock

pytestmark = pytest.mark.either_tree
CONFIG = load_config(["experiment=demo", "engine=nemo_rl_local"])


@pytest.fixture(autouse=True)
def _nothing_stays_installed():
    yield
    seam.uninstall()


def _names():
    return {(module, name): getattr(module, name) for module, name in callers()}


def test_nemo_rl_gets_its_own_functions_back():
    """Behind the outermost block, and behind an error."""
    before = _names()
    with pytest.raises(RuntimeError), seam.installed():
        with seam.installed():
            pass
        assert all(function is not before[key] for key, function in _names().items())
        raise RuntimeError
    assert _names() == before


@pytest.mark.parametrize("name", ["run_multi_turn_rollout", "run_async_multi_turn_rollout"])
def test_the_type_of_the_map_decides(monkeypatch, name):
    """Keywords as the trainer passes them, positions as validation does; a dict gets NeMo-RL's."""
    grpo = importlib.import_module("nemo_rl.algorithms.grpo")
    called = []
    monkeypatch.setattr(grpo, name, _recorder(getattr(grpo, name), called))
    ours = lambda task_to_env, call: called.append(("ours", call))  # noqa: E731
    monkeypatch.setattr(TrainingMap, "roll_out", ours)
    plain, marked = {"math": 1}, TrainingMap({"math": 1}, CONFIG)
    with seam.installed():
        getattr(grpo, name)("generation", "batch", "tokenizer", plain, max_seq_len=9, greedy=False)
        getattr(grpo, name)(
            policy_generation="generation",
            input_batch="batch",
            tokenizer="tokenizer",
            task_to_env=marked,
            max_seq_len=9,
            max_rollout_turns=1,
            greedy=False,
        )
    assert called[0] == ("theirs", ("generation", "batch", "tokenizer", plain))
    who, call = called[1]
    assert who == "ours"
    assert call.arguments["task_to_env"] is marked
    assert call.arguments["input_batch"] == "batch"
    assert call.concurrently is ("async" in name)


def _recorder(original, called):
    import functools

    @functools.wraps(original)
    def record(*args, **kwargs):
        called.append(("theirs", args))

    return record


def test_problems_that_are_asked_for_together_are_rolled_out_one_by_one(monkeypatch):
    """NeMo-RL's main asks for a batch and takes groups as they come, 0.7 for each by itself."""
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    from nemo_rl.experience import rollouts

    collector = importlib.import_module("nemo_rl.algorithms.async_utils.trajectory_collector")
    name = "run_async_multi_turn_rollout_groups"
    if not hasattr(collector, name):
        pytest.skip("NeMo-RL 0.7 asks for one problem at a time")
    seen, one_is_taken = [], threading.Event()

    def roll_out(task_to_env, call):
        seen.append((call.original, call.concurrently, sorted(call.arguments)))
        rows = call.arguments["input_batch"]
        if rows["idx"] != [1, 1]:  # the second problem is done first
            assert one_is_taken.wait(30)
        if rows["idx"] == [2, 2]:
            raise RolloutError("problem 2")
        return rows, {"of": rows["idx"][0]}

    async def taken():
        batch = BatchedDataDict({"idx": [0, 0, 1, 1, 2, 2], "message_log": [[]] * 6})
        given = {"input_batch": batch, "num_generations": 2, "max_seq_len": 9, "greedy": False}
        given |= {"policy_generation": 1, "tokenizer": 2, "max_rollout_turns": 1}
        found = []
        with pytest.raises(RolloutError, match="problem 2"):
            async for each in getattr(collector, name)(task_to_env=marked, **given):
                found.append((each.group_index, each.final_batch["idx"], each.rollout_metrics))
                one_is_taken.set()
        return found

    marked = TrainingMap({"math": 1}, CONFIG)
    monkeypatch.setattr(TrainingMap, "roll_out", roll_out)
    with seam.installed():
        found = asyncio.run(taken())
    assert found in ([(1, [1, 1], {"of": 1})], [(i, [i, i], {"of": i}) for i in (1, 0)])
    assert {one for one, *_ in seen} == {rollouts.run_async_multi_turn_rollout}
    assert all(concurrently for _, concurrently, _ in seen)
    assert all("num_generations" not in arguments for *_, arguments in seen)


def test_a_map_that_arrives_in_another_process_installs_the_seam():
    packed = pickle.dumps(TrainingMap({"math": 1}, CONFIG, StepClock(7)))
    before = _names()
    arrived = pickle.loads(packed)
    assert all(function is not before[key] for key, function in _names().items())
    assert isinstance(arrived, TrainingMap)
    assert (dict(arrived), arrived.config, arrived.clock.finished) == ({"math": 1}, CONFIG, 7)
    assert arrived.prefetcher is None


def test_it_arrives_in_a_ray_process_with_the_seam(ray_cluster):
    """As NeMo-RL's collector and data-plane actor get it."""
    import ray

    @ray.remote
    def names_in_place(task_to_env):
        grpo = importlib.import_module("nemo_rl.algorithms.grpo")
        collector = importlib.import_module("nemo_rl.algorithms.async_utils.trajectory_collector")
        theirs = [value for name, value in vars(collector).items() if name.startswith("run_async")]
        functions = [grpo.run_multi_turn_rollout, *theirs]
        return type(task_to_env).__name__, [hasattr(f, "__wrapped__") for f in functions]

    arrived = ray.get(names_in_place.remote(TrainingMap({"math": 1}, CONFIG)))
    assert arrived == ("TrainingMap", [True, True])

"""The rollouts' contract with NeMo-RL, and what they do when something goes wrong."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from types import SimpleNamespace

import nemo_runs
import pytest
import torch
from nemo_rl.algorithms.utils import get_gdpo_reward_component_keys
from nemo_rl.data.collate_fn import rl_collate_fn
from nemo_rl.distributed.batched_data_dict import BatchedDataDict

from igrpo_nemo.config import load_config
from igrpo_nemo.environment import StepReturn, TwoStageEnvironment
from igrpo_nemo.feedback import NextPrompt
from igrpo_nemo.nemo import data, rollout
from igrpo_nemo.nemo.batches import MessageCompletion, trained_batch
from igrpo_nemo.nemo.failure import RolloutError
from igrpo_nemo.nemo.rollout import TrainingMap, ValidationMap
from igrpo_nemo.nemo.seam import RolloutCall
from igrpo_nemo.nemo.stages import Item, Wanted
from igrpo_nemo.run import core
from igrpo_nemo.types import Group, Problem, Prompt, Score, Stage, StopReason, TrainingRow

RIGHT, WRONG = "<answer>3</answer>", "<answer>4</answer>"


def _generated(inputs, answers):
    """vLLM's answer in NeMo-RL's form: right-padded rows of prompt and answer."""
    lengths = inputs["input_lengths"].tolist()
    rows = [
        ids[:length].tolist() + answer
        for ids, length, answer in zip(inputs["input_ids"], lengths, answers, strict=True)
    ]
    output = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return BatchedDataDict(
        {
            "output_ids": output,
            "generation_lengths": torch.tensor([len(answer) for answer in answers]),
            "unpadded_sequence_lengths": torch.tensor([len(row) for row in rows]),
            "logprobs": torch.full(output.shape, -0.5),
            "truncated": torch.zeros(len(rows), dtype=torch.bool),
        }
    )


class Generation:
    """Answers from a list, in order, whatever is asked; None stands for no token at all."""

    def __init__(self, tokenizer, texts):
        self.tokenizer = tokenizer
        self.texts = list(texts)
        self.prompts: list[tuple[int, ...]] = []
        self.cfg = {"backend": "vllm", "vllm_cfg": {"async_engine": True}}

    def _row(self, ids, length):
        text = self.texts.pop(0)
        if isinstance(text, Exception):
            raise text
        self.prompts.append(tuple(ids[:length].tolist()))
        return [] if text is None else self.tokenizer(text, add_special_tokens=False).input_ids

    def generate(self, inputs, greedy):
        pairs = zip(inputs["input_ids"], inputs["input_lengths"].tolist(), strict=True)
        return _generated(inputs, [self._row(ids, length) for ids, length in pairs])

    async def generate_async(self, inputs, greedy=False):
        yield 0, self.generate(inputs, greedy)


class Scoring:
    """The environment in this process, in the place of the actor's client."""

    def __init__(self, config, tokenizer):
        from igrpo_nemo.rewards import build_scorer

        self.core = TwoStageEnvironment(
            core.prompt_builder(config, tokenizer), build_scorer(), config.feedback
        )

    seconds = 0.0

    async def step(self, stage, attempt):
        return self.core.step(stage, [attempt])[0]


def _never(**_):
    raise AssertionError("NeMo-RL's own rollout is not called")


@pytest.fixture(scope="module")
def opened(policy_folder, tmp_path_factory):
    """N = 2, G = 2: the config, its tokenizer, and the environment."""
    from nemo_rl.algorithms.utils import get_tokenizer

    counts = ["igrpo.num_drafts=2", "igrpo.num_refinements=2"]
    config = nemo_runs.tiny_config(policy_folder, tmp_path_factory.mktemp("run"), *counts)
    tokenizer = get_tokenizer({"name": policy_folder})
    return config, tokenizer, Scoring(config, tokenizer)


@pytest.fixture
def world(opened, monkeypatch):
    """Rolls problems out, with an engine that answers with these texts."""
    config, tokenizer, scoring = opened
    data.configure(config)
    monkeypatch.setattr(rollout, "EnvironmentClient", lambda *args: scoring)

    def batch(*questions):
        rows = [
            {"id": f"p{n}", "question": q, "answer": "3", "task_name": data.TASK}
            for n, q in enumerate(questions)
        ]
        datums = [data.problem_processor(row, None, tokenizer, 64, n) for n, row in enumerate(rows)]
        return rl_collate_fn(datums).repeat_interleave(2)

    def run(texts, *questions, asynchronous=False, **changes):
        changed = config.replaced("igrpo", **changes)
        scoring.core.feedback = changed.feedback
        generation = Generation(tokenizer, texts)
        arguments = {
            "policy_generation": generation,
            "input_batch": batch(*questions),
            "tokenizer": tokenizer,
        }
        task_to_env = TrainingMap({data.TASK: None}, changed)
        call = RolloutCall(_never, arguments, asynchronous)
        return *task_to_env.roll_out(call), generation

    return run


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_what_nemo_rl_gets(world, asynchronous):
    texts = [WRONG, RIGHT, WRONG, RIGHT, RIGHT, WRONG, RIGHT, WRONG]
    batch, metrics, generation = world(texts, "1+2=", "2+1=", asynchronous=asynchronous)
    assert len(batch["message_log"]) == 4
    for log, length in zip(batch["message_log"], batch["length"].tolist(), strict=True):
        prompt, answer = log
        assert [prompt["role"], answer["role"]] == ["user", "assistant"]
        assert RIGHT in prompt["content"]
        assert "generation_logprobs" not in prompt
        assert len(prompt["token_ids"]) == length
        assert len(answer["generation_logprobs"]) == len(answer["token_ids"]) > 0
        assert (answer["generation_logprobs"] == -0.5).all()
    assert sorted(batch["total_reward"].tolist()) == [0.0, 0.0, 1.0, 1.0]
    first, second = (batch[key] for key in get_gdpo_reward_component_keys(batch))
    assert (first + second).tolist() == batch["total_reward"].tolist()
    assert batch["loss_multiplier"].tolist() == [1.0] * 4
    assert batch["truncated"].tolist() == [False] * 4
    assert [info["problem"]["id"] for info in batch["extra_env_info"]] == ["p0", "p0", "p1", "p1"]
    assert metrics["mean_gen_tokens_per_sample"] > 0
    assert metrics["igrpo/best_draft_accuracy"] == 1.0
    assert metrics["igrpo/refinement_accuracy"] == 0.5
    assert len(generation.prompts) == 8


def test_the_batch_handed_in_is_left_as_it_was(world):
    texts = [WRONG, RIGHT, WRONG, RIGHT]
    batch, _, generation = world(texts, "1+2=")
    assert generation.prompts[0] == generation.prompts[1] != generation.prompts[2]
    batch["message_log"][0][1]["token_loss_mask"] = 1
    assert "token_loss_mask" not in batch["message_log"][1][1]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_an_empty_answer_is_never_a_row(world, asynchronous):
    texts = [RIGHT, RIGHT, RIGHT, None, *[RIGHT] * 6]
    with pytest.raises(
        RolloutError, match=r"problem p1, stage draft: the engine returned no token"
    ):
        world(texts, "1+2=", "2+1=", asynchronous=asynchronous)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_prompt_that_nemo_rl_cut_keeps_its_zero_weight(world, asynchronous):
    """No Stage 1, one answer, no weight; the other problem is whole."""
    texts = [RIGHT] * 9
    batch, metrics, generation = world(texts, "1+2=", "1+" * 99, asynchronous=asynchronous)
    assert batch["loss_multiplier"].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert batch["length"].tolist()[2:] == [data.CUT_TOKENS] * 2
    assert len(generation.prompts) == 5
    assert batch["total_reward"][2] == batch["total_reward"][3]
    assert metrics["igrpo/refinement_accuracy"] == 1.0


def test_a_skipped_problem_keeps_its_rows_without_weight(world):
    texts = ["nothing", "nothing", WRONG, RIGHT, RIGHT, RIGHT]
    batch, metrics, _ = world(texts, "1+2=", "2+1=", on_all_zero="skip")
    assert batch["loss_multiplier"].tolist() == [0.0, 0.0, 1.0, 1.0]
    assert batch["total_reward"][0] == batch["total_reward"][1]
    assert metrics["igrpo/skipped_rate"] == 0.5


def test_rows_of_two_problems_are_no_group(world, monkeypatch):
    original = rollout.items_of

    def mixed(batch, rows):
        batch["idx"][0] = 7
        return original(batch, rows)

    monkeypatch.setattr(rollout, "items_of", mixed)
    with pytest.raises(RolloutError, match="do not belong to one problem"):
        world([RIGHT] * 8, "1+2=", "2+1=")


def test_a_group_goes_to_one_shard():
    """The engine's round robin is overruled; a new group goes where least is running."""
    from igrpo_nemo.nemo.engines import Router, ShardView

    router = Router(3)
    assert [router.enter(2), router.enter(1), router.enter(1)] == [0, 1, 2]
    router.leave(1)
    assert router.enter(2) == 1
    assert router.enter(1) == 2

    async def ask(shards):
        engine = Shards()

        async def one(shard):
            inputs = {"input_ids": torch.tensor([[1]]), "input_lengths": torch.tensor([1])}
            async for _ in ShardView(engine, shard).generate_async(inputs):
                pass

        await asyncio.gather(*(one(shard) for shard in shards))
        return engine.chosen

    assert asyncio.run(ask([2, 2, 0, 2])) == [2, 2, 0, 2]


class Shards:
    """vLLM's asynchronous interface: eight shards in turn, a token an answer."""

    cfg = {"backend": "vllm", "vllm_cfg": {"async_engine": True}}
    worker_group = SimpleNamespace(dp_size=8)

    def __init__(self):
        self.current_generate_dp_shard_idx = 0
        self.chosen: list[int] = []

    async def generate_async(self, data, greedy=False):
        self.chosen.append(self.current_generate_dp_shard_idx)
        self.current_generate_dp_shard_idx = (self.current_generate_dp_shard_idx + 1) % 8
        await asyncio.sleep(0.2)
        yield 0, _generated(data, [[40]])


@pytest.fixture
def engine_over():
    from igrpo_nemo.nemo.engines import AsyncEngine
    from igrpo_nemo.run.tokenizer import build_small_tokenizer

    tokenizer = build_small_tokenizer(["a few words"] * 8, 270)
    return lambda generation: AsyncEngine(generation, tokenizer, stop_strings=None, greedy=False)


def test_rollouts_in_several_threads_share_the_shards_out(engine_over):
    """The asynchronous trainer rolls out each problem in a call, and a thread, of its own."""
    from igrpo_nemo.nemo.engines import router_of

    generation = Shards()
    together = threading.Barrier(8)

    def roll_out():
        engine, prompt = engine_over(generation), Prompt("q", (1, 2))
        item = Item(Problem("p", "q", "a"), prompt, 0)

        async def then(wanted, completions):
            return completions

        async def group():
            together.wait()
            return await engine.sample([Wanted(item, "draft", NextPrompt(prompt, 4))], then)

        [completions] = asyncio.run(group())
        assert len(completions) == 4

    threads = [threading.Thread(target=roll_out) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(generation.chosen) == dict.fromkeys(range(8), 4)
    assert sum(router_of(generation)._running) == 0


ALONE = ["experiment=demo", "engine=nemo_rl_local", "feedback=none", "igrpo.budget=2"]


class Verifier:
    """In the place of the actor's: an answer is right if it says so."""

    def __init__(self, actor, step_number):
        assert (actor, step_number) == ("actor", 1)

    async def step(self, stage, attempt):
        scores = tuple(
            Score(float(len(c.text)), {"accuracy": float(c.text == "right")}, "verdict")
            for c in attempt.completions
        )
        group = Group(attempt.problem, Stage.DRAFT, attempt.prompt, attempt.completions, scores)
        return StepReturn(group, None, (), True)


def _answered(texts):
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
        "idx": [0] * len(texts),
        "extra_env_info": [{"problem": problem, "thinking_open": False}] * len(texts),
        "task_name": ["igrpo"] * len(texts),
        "loss_multiplier": torch.ones(len(texts)),
        "truncated": torch.zeros(len(texts), dtype=torch.bool),
        "total_reward": torch.tensor([1.0, 2.0]),
    }


def test_validation_measures_what_a_function_of_the_users_rewards(monkeypatch):
    """Beside NeMo-RL's accuracy, with every answer to a problem: what the environment gives it."""
    monkeypatch.setattr(rollout, "EnvironmentClient", Verifier)
    custom = "igrpo.reward.custom={own_rewards:share: 1.0}"
    config = load_config([*ALONE, custom, "igrpo.validation.samples=2"])
    task_to_env = ValidationMap({"igrpo": "actor"}, config)
    batch = BatchedDataDict(_answered(["wrong", "right"]))
    given = {"input_batch": batch.slice(0, 1)}
    returned, _ = task_to_env.roll_out(RolloutCall(lambda input_batch: (batch, {}), given, True))
    assert returned is batch
    assert task_to_env.take() == {"val/reward": 5.0}
    assert task_to_env.take() == {}


def test_a_group_of_several_contexts_is_refused():
    """NeMo-RL would take each of its rows for a group of its own, and learn nothing."""
    completion = MessageCompletion("", (7,), (), StopReason.EOS, {})
    rows = [TrainingRow("p/refine", Stage.REFINE, (1, n), completion, float(n)) for n in range(2)]
    with pytest.raises(RolloutError, match="group p/refine under several contexts"):
        trained_batch(BatchedDataDict({"message_log": [[]] * 2}), [(None, rows)], {})

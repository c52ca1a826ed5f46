"""NeMo-RL's other two trainers, which roll out in actors of their own: `grpo_train_sync` (data
plane, TransferQueue) and `async_grpo_train` (replay buffer)."""

from __future__ import annotations

import re
import statistics
import threading
import time
from collections import Counter
from pathlib import Path

import nemo_runs
import pytest
from nemo_runs import ASYNC, SYNC

from igrpo_nemo.errors import UserError
from igrpo_nemo.nemo import launch, run_log
from igrpo_nemo.nemo.failure import LostProcessError, RolloutError
from igrpo_nemo.nemo.trainers import asynchronous, watchdog
from igrpo_nemo.rewards import ScoreRequest
from igrpo_nemo.run import core
from igrpo_nemo.types import Problem

DATA_PLANE = [ASYNC, "data_plane={enabled: true}"]
ASYNCHRONOUS = [
    ASYNC,
    "grpo.async_grpo={enabled: true, max_trajectory_age_steps: 1}",
    "loss_fn.use_importance_sampling_correction=true",
    "policy.generation.colocated.enabled=false",
    "policy.generation.colocated.resources.gpus_per_node=1",
    "cluster.gpus_per_node=2",
]
SAVING = ["checkpointing.enabled=true", "checkpointing.save_period=2"]
TRAINERS = pytest.mark.parametrize(
    "trainer",
    [pytest.param(DATA_PLANE, id="data-plane"), pytest.param(ASYNCHRONOUS, id="asynchronous")],
)


def _rows(config, step):
    """What was trained in a step: (problem, q' ids, completion ids, reward), checked row by row
    against the core: the context is q' of that problem and the draft in it, the reward is right."""
    from nemo_rl.algorithms.utils import get_tokenizer

    from igrpo_nemo.nemo import data

    folder = Path(config.logger.log_dir)
    tokenizer = get_tokenizer({"name": config.policy.model_name})
    builder, scorer = core.prompt_builder(config, tokenizer), core.scorer_of(config)
    rows = data.ProblemDataset(str(folder / "problems" / "train.jsonl")).dataset
    problems = [Problem(row["id"], row["question"], row["answer"]) for row in rows]
    tag = config.igrpo.prompt.draft_tag
    found = []
    for row in nemo_runs.dump(folder, step):
        context, answer = nemo_runs.trained(row)
        [draft] = re.findall(rf"<{tag}>\n(.*)\n</{tag}>", tokenizer.decode(context), re.DOTALL)
        [problem] = [p for p in problems if builder.refinement(p, draft).token_ids == context]
        ended = answer[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(answer, skip_special_tokens=True)
        prompt = builder.refinement(problem, draft)
        [score] = scorer([ScoreRequest(problem, text, prompt.thinking_open, truncated=not ended)])
        assert row["rewards"] == pytest.approx(score.reward)
        found.append((problem.id, context, answer, row))
    return found


class _TornInner:
    """A data loader whose second batch cannot be read."""

    def __init__(self, inner):
        self.inner = inner

    def __len__(self):
        return len(self.inner)

    def __iter__(self):
        yield next(iter(self.inner))
        raise OSError("torn page")

    def state_dict(self):
        return self.inner.state_dict()


class _Torn(asynchronous.EndlessLoader):
    def __init__(self, inner, config, report):
        super().__init__(_TornInner(inner), config, report)


@pytest.mark.either_tree
@TRAINERS
def test_exactly_the_refinements_are_trained_under_their_q_prime(
    ray_cluster, policy_folder, tmp_path, trainer
):
    """N = 2, G = 4; three steps; groups share their q'; logs and samples come from the actors."""
    folder = tmp_path / "run"
    config = nemo_runs.tiny_config(
        policy_folder,
        folder,
        *trainer,
        "igrpo.num_drafts=2",
        "igrpo.num_refinements=4",
        "grpo.max_num_steps=3",
        "grpo.val_at_start=true",
        "igrpo.sample_table_period=1",
    )
    assert launch.train(config) == 0
    logged = nemo_runs.metrics(folder)
    assert [each["igrpo/completions"] for each in logged] == [48.0] * 3
    for step, metrics in enumerate(logged, start=1):
        rows = _rows(config, step)
        assert len(rows) == 32
        assert set(Counter(context for _, context, _, _ in rows).values()) <= {4, 8, 12}
        assert set(Counter(problem for problem, _, _, _ in rows).values()) == {4}
        rewards = [row["rewards"] for *_, row in rows]
        assert metrics["igrpo/refinement_reward"] == pytest.approx(sum(rewards) / 32)
        assert metrics["igrpo/trained_reward"] == pytest.approx(sum(rewards) / 32)
        # Sampled with the weights of this step, or of the one before: in step 1 there is only one.
        gaps = [_logprob_gap(row) for *_, row in rows]
        current = trainer is DATA_PLANE or step == 1
        assert max(gaps) < 1e-4 if current else statistics.median(gaps) < 1.5
    assert any(a != 0 for *_, row in _rows(config, 1) for a in row["advantages"])
    assert len(nemo_runs.metrics(folder, "val")) == 1
    assert (folder / "samples.jsonl").read_text().count("\n") == 24
    assert (folder / "finished").exists()


def _logprob_gap(row):
    """The largest distance between the engine's and the policy's log-probs of trained tokens."""
    pairs = zip(
        row["generation_logprobs"], row["prev_logprobs"], row["token_loss_mask"], strict=True
    )
    return max(abs(ours - theirs) for ours, theirs, trained in pairs if trained)


@pytest.mark.parametrize("feedback", ["best_draft", "none"])
def test_the_data_plane_trains_like_grpo_train(ray_cluster, policy_folder, tmp_path, feedback):
    """Three steps with the synchronous engine: the same metrics, and weights to the last bit."""
    base = [SYNC, f"feedback={feedback}", "grpo.max_num_steps=3"]
    base.append("igrpo.budget=4" if feedback == "none" else "igrpo.budget=null")
    weights, logs = [], []
    for name, options in {"plain": [], "queue": ["data_plane={enabled: true}"]}.items():
        config = nemo_runs.tiny_config(policy_folder, tmp_path / name, *base, *options)
        [policy] = nemo_runs.train(config).policies
        weights.append(policy.model.state_dict())
        logs.append(nemo_runs.metrics(tmp_path / name))
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    for plain, queue in zip(*logs, strict=True):
        ours, theirs = (
            {name: value for name, value in each.items() if name.startswith("igrpo/")}
            for each in (plain, queue)
        )
        assert ours and ours == pytest.approx(theirs)


def test_the_asynchronous_trainer_reads_its_data_again_and_resumes(
    ray_cluster, policy_folder, tmp_path
):
    """Two batches an epoch, five steps; stopped after two, whose log the resumed run keeps."""
    base = [*ASYNCHRONOUS, *SAVING, "data.train.num_problems=16", "grpo.max_num_epochs=9"]
    folder = tmp_path / "run"
    launch.train(nemo_runs.tiny_config(policy_folder, folder, *base, "grpo.max_num_steps=2"))
    before = nemo_runs.metrics(folder)
    assert (folder / "checkpoints" / "step_2" / "replay_buffer.pt").exists()
    launch.train(nemo_runs.tiny_config(policy_folder, folder, *base, "grpo.max_num_steps=5"))
    after = nemo_runs.metrics(folder)
    assert len(after) == 5
    assert after[:2] == before


@pytest.mark.either_tree
@TRAINERS
def test_a_rollout_that_fails_in_an_actor_ends_the_run_with_its_error(
    ray_cluster, policy_folder, tmp_path, monkeypatch, trainer
):
    """The environment is gone for good after the first step."""
    import ray
    from nemo_rl.data import utils

    environments = []
    create = utils.create_env
    finish = run_log.RunLog._finish

    def created(**arguments):
        environments.append(create(**arguments))
        return environments[-1]

    def finished(log, step):
        finish(log, step)
        for environment in environments:
            ray.kill(environment)

    monkeypatch.setattr(utils, "create_env", created)
    monkeypatch.setattr(run_log.RunLog, "_finish", finished)
    config = nemo_runs.tiny_config(
        policy_folder, tmp_path / "run", *trainer, "grpo.max_num_steps=4"
    )
    with pytest.raises(RolloutError, match=r"^problem \S+, stage (draft|refine).*: .*actor.*died"):
        launch.train(config)
    assert 1 <= len(nemo_runs.metrics(tmp_path / "run")) <= 2
    assert not (tmp_path / "run" / "finished").exists()


@pytest.mark.either_tree
def test_a_collector_that_dies_ends_the_run(ray_cluster, policy_folder, tmp_path, monkeypatch):
    """As by the out-of-memory killer, before it has brought anything: the trainer waits for it."""
    import psutil

    ended = []

    def end_collector():
        deadline = time.monotonic() + 120
        while not ended and time.monotonic() < deadline:
            time.sleep(0.1)
            for process in psutil.Process().children(recursive=True):  # those of this Ray
                name = _command(process)
                if "AsyncTrajectoryCollector" in name and "__init__" not in name:
                    process.kill()
                    ended.append(name)

    monkeypatch.setattr(watchdog, "ENDING_S", 2.0)
    config = nemo_runs.tiny_config(
        policy_folder, tmp_path / "run", *ASYNCHRONOUS, "grpo.max_num_steps=9"
    )
    killer = threading.Thread(target=end_collector)
    killer.start()
    with pytest.raises(LostProcessError, match=r"^the process that rolls out is gone"):
        launch.train(config)
    killer.join()
    assert ended
    assert not (tmp_path / "run" / "finished").exists()


def _command(process):
    import psutil

    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it ended meanwhile
        return ""


def test_data_that_cannot_be_read_end_the_asynchronous_run(
    ray_cluster, policy_folder, tmp_path, monkeypatch
):
    """NeMo-RL's collector prints the error and stops collecting."""
    monkeypatch.setattr(asynchronous, "EndlessLoader", _Torn)
    config = nemo_runs.tiny_config(
        policy_folder, tmp_path / "run", *ASYNCHRONOUS, "grpo.max_num_steps=9"
    )
    with pytest.raises(RolloutError, match=r"torn page"):
        launch.train(config)
    assert not (tmp_path / "run" / "finished").exists()


def test_a_missing_transfer_queue_is_named(policy_folder, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transfer_queue" else find(name)
    )
    config = nemo_runs.tiny_config(policy_folder, tmp_path / "run", *DATA_PLANE)
    with pytest.raises(UserError, match="needs the package TransferQueue"):
        launch.train(config)

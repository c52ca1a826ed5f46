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
from igrpo_nemo.nemo import failure, launch, run_log, trainers
from igrpo_nemo.nemo.failure import LostProcessError, RolloutError
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


class _Torn:
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


def _check_rows(config, steps, current):
    """N = 2, G = 4: groups share their q'; logs and samples come from the actors. `current` steps
    were sampled with the weights that they trained, the others with those of one before."""
    folder = Path(config.logger.log_dir)
    logged = nemo_runs.metrics(folder)
    assert [each["igrpo/completions"] for each in logged] == [48.0] * steps
    for step, metrics in enumerate(logged, start=1):
        rows = _rows(config, step)
        assert len(rows) == 32
        assert set(Counter(context for _, context, _, _ in rows).values()) <= {4, 8, 12}
        assert set(Counter(problem for problem, _, _, _ in rows).values()) == {4}
        rewards = [row["rewards"] for *_, row in rows]
        assert metrics["igrpo/refinement_reward"] == pytest.approx(sum(rewards) / 32)
        assert metrics["igrpo/trained_reward"] == pytest.approx(sum(rewards) / 32)
        gaps = [_logprob_gap(row) for *_, row in rows]
        assert max(gaps) < 1e-4 if step <= current else statistics.median(gaps) < 1.5
    assert any(a != 0 for *_, row in _rows(config, 1) for a in row["advantages"])
    assert len(nemo_runs.metrics(folder, "val")) == 1
    assert (folder / "samples.jsonl").read_text().count("\n") == 8 * steps
    assert (folder / "finished").exists()


def _logprob_gap(row):
    """The largest distance between the engine's and the policy's log-probs of trained tokens."""
    pairs = zip(
        row["generation_logprobs"], row["prev_logprobs"], row["token_loss_mask"], strict=True
    )
    return max(abs(ours - theirs) for ours, theirs, trained in pairs if trained)


SHAPE = [
    "igrpo.num_drafts=2",
    "igrpo.num_refinements=4",
    "grpo.val_at_start=true",
    "igrpo.sample_table_period=1",
]


@pytest.mark.either_tree
@pytest.mark.parametrize("feedback", ["best_draft", "none"])
def test_the_data_plane_trains_like_grpo_train(ray_cluster, policy_folder, tmp_path, feedback):
    """Three steps with the synchronous engine, the last one of an epoch that a curriculum made: the
    same metrics, and weights to the last bit; of two stages exactly the refinements under q'."""
    base = [SYNC, f"feedback={feedback}", "igrpo.curriculum_keep=0", "grpo.max_num_steps=3"]
    base += ["data.train.num_problems=16", "grpo.max_num_epochs=9"]
    base += ["igrpo.budget=4"] if feedback == "none" else SHAPE
    weights, logs = [], []
    for name, options in {"plain": [], "queue": ["data_plane={enabled: true}"]}.items():
        config = nemo_runs.tiny_config(policy_folder, tmp_path / name, *base, *options)
        [policy] = nemo_runs.train(config).policies
        weights.append(policy.model.state_dict())
        logs.append(nemo_runs.metrics(tmp_path / name))
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    for plain, queue in zip(*logs, strict=True):
        ours, theirs = (
            {name: value for name, value in each.items() if name.startswith(("igrpo/", "data/"))}
            for each in (plain, queue)
        )
        assert ours and ours == pytest.approx(theirs)
    assert logs[0][-1]["data/left_out"] > 0
    if feedback != "none":
        _check_rows(config, steps=3, current=3)


@pytest.fixture
def environments(monkeypatch):
    """Those that the runs of a test have made."""
    from nemo_rl.data import utils

    made, create = [], utils.create_env

    def created(**arguments):
        made.append(create(**arguments))
        return made[-1]

    monkeypatch.setattr(utils, "create_env", created)
    return made


def _gone_after(monkeypatch, environments, step):
    """The environment is gone for good once a step is logged."""
    import ray

    finish = run_log.RunLog._finish

    def finished(log, number):
        finish(log, number)
        for environment in environments if number >= step else ():
            ray.kill(environment)

    monkeypatch.setattr(run_log.RunLog, "_finish", finished)


GONE = r"^problem \S+, stage (draft|refine).*: .*actor.*died"


@pytest.mark.either_tree
def test_a_rollout_that_fails_in_the_data_planes_actor_ends_the_run_with_its_error(
    ray_cluster, policy_folder, tmp_path, monkeypatch, environments
):
    _gone_after(monkeypatch, environments, 1)
    config = nemo_runs.tiny_config(policy_folder, tmp_path, *DATA_PLANE, "grpo.max_num_steps=4")
    with pytest.raises(RolloutError, match=GONE):
        launch.train(config)
    assert len(nemo_runs.metrics(tmp_path)) == 1
    assert not (tmp_path / "finished").exists()


@pytest.mark.either_tree
def test_the_asynchronous_trainer_reads_its_data_again_resumes_and_ends_with_its_collectors_error(
    ray_cluster, policy_folder, tmp_path, monkeypatch, environments
):
    """Two batches an epoch, three steps; then two more, behind whose log they stand, until no
    environment answers."""
    base = [*SHAPE, *ASYNCHRONOUS, "checkpointing.enabled=true", "checkpointing.save_period=3"]
    base += ["data.train.num_problems=16", "grpo.max_num_epochs=9"]
    config = nemo_runs.tiny_config(policy_folder, tmp_path, *base, "grpo.max_num_steps=3")
    nemo_runs.train(config)
    # In step 1 there is only one version of the weights.
    _check_rows(config, steps=3, current=1)
    before = nemo_runs.metrics(tmp_path)
    assert (tmp_path / "checkpoints" / "step_3" / "replay_buffer.pt").exists()
    _gone_after(monkeypatch, environments, 5)
    more = nemo_runs.tiny_config(policy_folder, tmp_path, *base, "grpo.max_num_steps=9")
    with pytest.raises(RolloutError, match=GONE):
        launch.train(more)
    after = nemo_runs.metrics(tmp_path)
    assert 5 <= len(after) <= 6
    assert after[:3] == before
    assert not (tmp_path / "finished").exists()


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

    monkeypatch.setattr(failure, "ENDING_S", 2.0)
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


def test_data_that_cannot_be_read_in_another_process_end_the_run(
    ray_cluster, policy_folder, tmp_path
):
    """NeMo-RL's collector prints the error and stops collecting; its trainer would wait."""
    import ray

    config = nemo_runs.tiny_config(policy_folder, tmp_path, *ASYNCHRONOUS)
    watchdog = failure.Watchdog()
    loader = trainers.EndlessLoader(_Torn([1, 2]), config, watchdog.reporter)
    read = ray.remote(num_cpus=0)(lambda loader: list(loader))
    with pytest.raises(RolloutError, match=r"torn page"), watchdog():
        read.remote(loader)
        threading.Event().wait(120)


def test_a_missing_transfer_queue_is_named(policy_folder, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transfer_queue" else find(name)
    )
    config = nemo_runs.tiny_config(policy_folder, tmp_path / "run", *DATA_PLANE)
    with pytest.raises(UserError, match="needs the package TransferQueue"):
        launch.train(config)

"""A curriculum by solve rate inside NeMo-RL: the embedded engine's order, saved with each step."""

from __future__ import annotations

from pathlib import Path

import nemo_runs
import pytest
from nemo_runs import SYNC

from igrpo_nemo.data.order import Curriculum, Position
from igrpo_nemo.nemo import run_log
from igrpo_nemo.run.problems import training_problems

CURRICULUM = [
    SYNC,
    "igrpo.curriculum_keep=0.2",
    "data.train.num_problems=20",
    "grpo.num_prompts_per_step=4",
    "igrpo.num_drafts=2",
    "igrpo.num_refinements=2",
    "grpo.max_num_steps=99",
    "checkpointing.enabled=true",
]
NAMES = ("data/left_out", "data/always_solved", "data/never_solved")


@pytest.fixture(scope="module")
def whole(ray_cluster, policy_folder, tmp_path_factory):
    """Three epochs, of which the first alone has all problems: the log, and the rollouts."""
    folder = tmp_path_factory.mktemp("whole")
    epochs = ["grpo.max_num_epochs=3", "checkpointing.save_period=99"]
    config = nemo_runs.tiny_config(policy_folder, folder, *CURRICULUM, *epochs)
    seen = nemo_runs.train(config)
    return config, nemo_runs.metrics(folder), seen.rollouts


def test_problems_come_in_the_embedded_engines_order(whole, tmp_path):
    """And the run ends with its data, its last step saved."""
    config, logged, rollouts = whole
    ids = [problem.id for problem in training_problems(config)]
    order, behind = Curriculum(ids, keep=0.2, batch_size=4, seed=config.grpo.seed), Position()
    assert 5 < len(rollouts) < 15
    for step, metrics in zip(rollouts, logged, strict=True):
        numbers, behind = order.take(behind)
        assert [each.problem.id for each in step] == [ids[number] for number in numbers]
        order.add(step)
        assert {name: metrics[name] for name in NAMES} == order.metrics()
    assert logged[0]["data/left_out"] == 0.0 < logged[-1]["data/left_out"]
    assert order.take(behind)[1].epoch == 3
    run = Path(config.logger.log_dir)
    assert (run / "finished").read_text() == f"{len(logged)}\n"
    assert (run / "checkpoints" / f"step_{len(logged)}").is_dir()


def test_a_resume_goes_on_in_the_same_order_with_the_same_rates(
    whole, policy_folder, tmp_path, monkeypatch
):
    """Stopped within the second epoch, after its order was decided, and with measurements of it."""
    finish = run_log.RunLog._finish

    def killed(log, step):
        finish(log, step)
        if step == 7:
            raise KeyboardInterrupt

    more = ["grpo.max_num_epochs=3", "checkpointing.save_period=6"]
    config = nemo_runs.tiny_config(policy_folder, tmp_path, *CURRICULUM, *more)
    _, expected, _ = whole
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_log.RunLog, "_finish", killed)
        nemo_runs.train(config)
    assert len(nemo_runs.metrics(tmp_path)) == 7
    nemo_runs.train(config)
    logged = nemo_runs.metrics(tmp_path)
    stable = ("loss", "grad_norm", "igrpo/draft_reward", "igrpo/refinement_reward", *NAMES)
    assert [[each[name] for name in stable] for each in logged] == [
        [each[name] for name in stable] for each in expected
    ]

"""NeMo-RL's loop and the embedded engine: the same advantages, loss, gradient and update.

NeMo-RL's `grpo_train` runs for one step; the rows it trained on then go through the embedded
engine's learner, from the same weights.
"""

from __future__ import annotations

import copy

import nemo_runs
import pytest
import torch
from every_draft import PATH

from igrpo_nemo.local.model import open_policy
from igrpo_nemo.local.parts import open_learner
from igrpo_nemo.local.rollout import shape_rows
from igrpo_nemo.objectives.advantage import group_advantages

BOTH = "igrpo.train_stages=[draft,refine]"
EXAMPLE = "{text: '<think>38</think><answer>38</answer>', intro: ''}"
CASES = [
    pytest.param(("grpo", "best_draft"), marks=pytest.mark.either_tree, id="grpo-best_draft"),
    ("gspo", "best_draft", BOTH),
    pytest.param(
        ("dr_grpo", "best_draft", BOTH),
        marks=pytest.mark.either_tree,
        id="dr_grpo-best_draft-both",
    ),
    ("dapo", "best_draft"),
    ("grpo", "best_draft", BOTH),
    ("dr_grpo", "best_draft", "igrpo.on_all_zero=skip"),
    ("gspo", "self_verification_short"),
    ("grpo", "critique_short"),
    ("dr_grpo", "critique_short", "igrpo.feedback_options.keep=2"),
    ("grpo", "exemplar", f"igrpo.feedback_options={EXAMPLE}"),
    ("dr_grpo", "best_draft", "igrpo.objective=own_objective:tilted"),
    # A feedback from elsewhere, which actor and rollout find by its path.
    ("grpo", "best_draft", f"igrpo.feedback={PATH}"),
    # Problems that an answer solved have no refinement: NeMo-RL gets rows without weight.
    ("grpo", "critique_short", "igrpo.feedback_options.refine=all_wrong"),
]


def _nemo_step(policy_folder, log_dir, monkeypatch, *overrides):
    """One step of NeMo-RL's loop: its config, rollouts, training data and the policy around it."""
    from igrpo_nemo.nemo.cpu import policy

    taken = {}
    original = policy.LocalPolicy.train

    def train(policy, data, loss_fn, *args, **kwargs):
        taken["before"] = copy.deepcopy(policy.model.state_dict())
        taken["data"], taken["policy"] = data, policy
        taken["gradients"] = _first_gradients(policy.model, policy.optimizer)
        taken["result"] = original(policy, data, loss_fn, *args, **kwargs)
        return taken["result"]

    monkeypatch.setattr(policy.LocalPolicy, "train", train)
    config = nemo_runs.tiny_config(
        policy_folder,
        log_dir,
        "grpo.max_num_steps=1",
        "grpo.max_num_epochs=9",
        "grpo.num_prompts_per_step=24",
        "data.train.num_problems=128",
        "igrpo.entropy.exact=true",
        # Adam divides by the gradient's size: a small eps turns rounding of near-zero gradients
        # into steps of full length.
        "policy.optimizer.kwargs.eps=1.0e-3",
        *overrides,
    )
    seen = nemo_runs.train(config)
    return config, seen, taken


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_one_step_is_the_same_on_both_engines(
    ray_cluster, policy_folder, tmp_path, monkeypatch, case
):
    """Advantages and loss to 1e-6 relative; gradient and update to 1e-5 in relative L2 norm."""
    objective, feedback, *options = case
    config, seen, nemo = _nemo_step(
        policy_folder,
        tmp_path / "run",
        monkeypatch,
        f"objective={objective}",
        f"feedback={feedback}",
        *options,
    )
    rows = _trained_rows(config, seen, nemo["data"])
    policy = open_policy(policy_folder, precision="float32")
    policy.model.load_state_dict(nemo["before"])
    learner = open_learner(config, policy)
    _same_advantages(config, rows, nemo["data"])
    gradients = _first_gradients(policy.model, learner.optimizer)
    learned = learner.update(rows)

    updates = config.igrpo.updates_per_rollout
    assert len(nemo["result"]["loss"]) == updates
    assert learned["loss"] == pytest.approx(
        float(nemo["result"]["loss"].sum()) / updates, rel=1e-6, abs=1e-7
    )
    _same_log(learned, *nemo_runs.metrics(tmp_path / "run"))
    _close(gradients, nemo["gradients"])
    theirs = nemo["policy"].model.state_dict()
    ours = policy.model.state_dict()
    moved = {name: ours[name] - nemo["before"][name] for name in ours}
    expected = {name: theirs[name] - nemo["before"][name] for name in ours}
    _close(moved, expected)


def _same_log(learned, logged):
    """Means over the updates of the step in both, be it one or four."""
    assert logged["loss"] == pytest.approx(learned["loss"], rel=1e-6, abs=1e-7)
    assert logged["entropy/exact"] == pytest.approx(learned["entropy/exact"], rel=1e-5)
    assert logged["lr"] == pytest.approx(learned["lr"])
    assert logged["policy/ratio_mean"] == pytest.approx(learned["policy/ratio_mean"], rel=0.05)
    # NeMo-RL weighs it by the ratio to the policy that sampled, another one from update 2 on.
    assert logged["entropy/sampled"] == pytest.approx(learned["entropy/sampled"], rel=0.3)
    assert logged["policy/engine_mismatch"] == pytest.approx(1.0, abs=1e-3)
    assert logged["policy/ratio_max"] >= learned["policy/ratio_max"] - 1e-6


def _first_gradients(model, optimizer):
    """Filled with the gradients of the first optimizer step, after clipping."""
    found = {}

    def note(*_):
        if not found:
            for name, parameter in model.named_parameters():
                found[name] = parameter.grad.clone()

    optimizer.register_step_pre_hook(note)
    return found


def _close(ours, theirs):
    """Within 1e-5 in relative L2 norm over all parameters."""
    assert _norm(theirs) > 0
    gap = {name: ours[name] - theirs[name] for name in theirs}
    assert _norm(gap) <= 1e-5 * _norm(theirs)


def _trained_rows(config, seen, data):
    """The core's training rows in the order in which NeMo-RL trained on them."""
    feedback = config.feedback
    known = {}
    for call in seen.rollouts:
        for rollout in call:
            for row in feedback.training_rows(rollout):
                known[row.context_ids, row.completion.token_ids, row.weight] = row
    picked = []
    for ids, length, mask, weight in zip(
        data["input_ids"],
        data["input_lengths"].tolist(),
        data["token_mask"],
        data["sample_mask"].tolist(),
        strict=True,
    ):
        if weight:
            start = int(mask.nonzero()[0])
            tokens = tuple(ids[:length].tolist())
            picked.append(known[tokens[:start], tokens[start:], weight])
    return shape_rows(picked, config.grpo)


def _same_advantages(config, rows, data):
    ours = group_advantages(
        torch.tensor([row.reward for row in rows]),
        [row.group for row in rows],
        normalize_rewards=config.grpo.normalize_rewards,
        use_leave_one_out_baseline=config.grpo.use_leave_one_out_baseline,
        delta=config.igrpo.advantage_delta,
    )
    starts = data["token_mask"].argmax(dim=1)
    theirs = data["advantages"].gather(1, starts[:, None])[data["sample_mask"] > 0, 0]
    assert ours.abs().max() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def _norm(tensors) -> float:
    return float(torch.cat([t.double().flatten() for t in tensors.values()]).norm())

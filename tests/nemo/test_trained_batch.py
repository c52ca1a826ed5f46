"""The batch that NeMo-RL trains on, through its own functions and without its loop: advantages,
loss and gradient are those of the embedded engine on the same rollouts, for every feedback."""

from __future__ import annotations

from dataclasses import replace

import nemo_runs
import pytest
import torch
from nemo_rl.algorithms.advantage_estimator import GRPOAdvantageEstimator
from nemo_rl.algorithms.grpo import (
    add_grpo_token_loss_masks_and_generation_logprobs,
    extract_initial_prompt_messages,
)
from nemo_rl.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn
from nemo_rl.data.llm_message_utils import batched_message_log_to_flat_message
from nemo_rl.distributed.batched_data_dict import BatchedDataDict

from igrpo_nemo.environment import TwoStageEnvironment
from igrpo_nemo.local.learner import Learner
from igrpo_nemo.local.model import open_policy
from igrpo_nemo.local.optimizer import build_scheduler
from igrpo_nemo.local.rollout import TwoStageRollout
from igrpo_nemo.local.sampler import Sampler
from igrpo_nemo.local.sampling import sampling_params
from igrpo_nemo.nemo.batches import MessageCompletion, equally_many, trained_batch
from igrpo_nemo.nemo.failure import RolloutError
from igrpo_nemo.nemo.loss import build_loss, next_token_logprobs
from igrpo_nemo.objectives.advantage import group_advantages
from igrpo_nemo.rewards import build_scorer
from igrpo_nemo.run.core import prompt_builder
from igrpo_nemo.tasks import generated_problems
from igrpo_nemo.types import Stage, StopReason, TrainingRow

CASES = [
    ("best_draft",),
    ("best_draft", "objective=gspo", "igrpo.updates_per_rollout=1"),
    ("best_draft", "objective=dr_grpo"),
    ("best_draft", "igrpo.train_stages=[draft,refine]"),
    ("best_draft", "igrpo.train_stages=[draft,refine]", "objective=dr_grpo"),
    ("best_draft", "igrpo.on_all_zero=skip"),
    ("self_verification_short",),
    ("critique_short",),
    ("critique_short", "objective=dr_grpo", "igrpo.feedback_options.keep=2"),
    ("critique_short", "igrpo.feedback_options.refine=all_wrong"),
]


def _with_message(group):
    """The group as NeMo-RL's engine would have made it."""
    completions = tuple(
        MessageCompletion(
            c.text,
            c.token_ids,
            (),
            c.stop_reason,
            {
                "role": "assistant",
                "content": c.text,
                "token_ids": torch.tensor(c.token_ids),
                "generation_logprobs": torch.tensor(c.logprobs),
            },
        )
        for c in group.completions
    )
    return replace(group, completions=completions)


def _rollouts(config, policy):
    prompts = prompt_builder(config, policy.tokenizer)
    environment = TwoStageEnvironment(prompts, build_scorer(), config.feedback)
    limit = config.policy.max_total_sequence_length
    sampler = Sampler(policy.model, policy.tokenizer, max_model_len=limit)
    problems = generated_problems("arithmetic", 12, lengths=(2,), seed=0, split="train")
    run = TwoStageRollout(environment, sampler, sampling_params(config), 3)
    return [
        replace(
            each,
            drafts=_with_message(each.drafts),
            refinements=tuple(map(_with_message, each.refinements)),
        )
        for each in run(problems, step=1)
    ]


def _nemo_data(config, problems):
    """`grpo_train` from the rollout's batch to the training data, with its own functions."""
    size = sum(len(rows) for _, rows in problems)
    before = BatchedDataDict({"message_log": [[]] * size, "loss_multiplier": torch.ones(size)})
    batch = trained_batch(before, problems, {"accuracy": 1.0, "format": 1.0})
    flat = {"pad_value_dict": {"token_ids": 0}}
    asked = extract_initial_prompt_messages(batch["message_log"], batch["length"])
    prompt_ids = batched_message_log_to_flat_message(asked, **flat)[0]["token_ids"]
    add_grpo_token_loss_masks_and_generation_logprobs(batch["message_log"])
    messages, lengths = batched_message_log_to_flat_message(batch["message_log"], **flat)
    data = BatchedDataDict(
        input_ids=messages["token_ids"],
        input_lengths=lengths,
        generation_logprobs=messages["generation_logprobs"],
        token_mask=messages["token_loss_mask"],
        sample_mask=batch["loss_multiplier"],
    )
    estimator = GRPOAdvantageEstimator(Keys(config.grpo.model_dump()), ClippedPGLossConfig())
    data["advantages"] = estimator.compute_advantage(
        prompt_ids=prompt_ids, rewards=batch["total_reward"], mask=data["token_mask"]
    )
    return data


class Keys(dict):
    """Read by item (NeMo-RL 0.7) or by attribute (its main)."""

    __getattr__ = dict.__getitem__


def _nemo_gradient(config, policy, data):
    temperature = config.policy.generation.temperature
    width = torch.arange(data["input_ids"].shape[1])
    attention = (width < data["input_lengths"][:, None]).long()
    logits = policy.model(input_ids=data["input_ids"], attention_mask=attention).logits
    logits = logits / temperature
    now = next_token_logprobs(logits.detach(), data["input_ids"])
    data["prev_logprobs"] = torch.nn.functional.pad(now, (1, 0))
    masks = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    loss_cfg = ClippedPGLossConfig(**config.loss_fn.model_dump())
    loss_fn = build_loss(ClippedPGLossFn(loss_cfg), loss_cfg, config, {})
    policy.model.zero_grad()
    loss, metrics = loss_fn(data, data["sample_mask"].sum(), masks.sum(), logits=logits)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.policy.max_grad_norm)
    return float(loss), metrics, _gradients(policy)


def _gradients(policy):
    gradients = [parameter.grad for parameter in policy.model.parameters()]
    return [each.clone() for each in gradients if each is not None]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_batch_trains_as_the_embedded_engine_does(policy_folder, tmp_path, case):
    feedback, *options = case
    config = nemo_runs.tiny_config(
        policy_folder,
        tmp_path,
        f"feedback={feedback}",
        *options,
        "igrpo.entropy.exact=true",
    )
    policy = open_policy(policy_folder, precision="float32")
    rollouts = _rollouts(config, policy)
    problems = [(each, equally_many(each, config.feedback)) for each in rollouts]
    assert {len(rows) for _, rows in problems} == {config.feedback.num_trained}
    data = _nemo_data(config, problems)
    loss, metrics, theirs = _nemo_gradient(config, policy, data)

    rows = [row for each in rollouts for row in config.feedback.training_rows(each)]
    ours = group_advantages(
        torch.tensor([row.reward for row in rows]),
        [row.group for row in rows],
        normalize_rewards=config.grpo.normalize_rewards,
        delta=config.igrpo.advantage_delta,
    )
    starts = data["token_mask"].argmax(dim=1)
    advantages = data["advantages"].gather(1, starts[:, None])[data["sample_mask"] > 0, 0]
    assert ours.abs().max() > 0
    torch.testing.assert_close(ours, advantages, rtol=1e-6, atol=1e-6)

    found = []
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: found.extend(_gradients(policy)))
    learner = Learner(policy.model, optimizer, build_scheduler(optimizer, ()), config)
    learned = learner.update(rows)
    assert learned["loss"] == pytest.approx(loss, rel=1e-6, abs=1e-6)
    assert learned["entropy/exact"] == pytest.approx(metrics["exact_entropy"], rel=1e-5)
    assert metrics["token_mult_prob_error"] == pytest.approx(1.0, abs=1e-3)
    gap = torch.cat([(a - b).flatten() for a, b in zip(found, theirs, strict=True)])
    size = torch.cat([each.flatten() for each in theirs]).norm()
    assert size > 0 and gap.norm() <= 1e-5 * size


def test_a_group_of_several_contexts_is_refused():
    """NeMo-RL would take each of its rows for a group of its own, and learn nothing."""
    completion = MessageCompletion("", (7,), (), StopReason.EOS, {})
    rows = [TrainingRow("p/refine", Stage.REFINE, (1, n), completion, float(n)) for n in range(2)]
    with pytest.raises(RolloutError, match="group p/refine under several contexts"):
        trained_batch(BatchedDataDict({"message_log": [[]] * 2}), [(None, rows)], {})

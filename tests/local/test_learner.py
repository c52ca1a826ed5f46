"""The policy update against a naive one, and against itself cut into other pieces."""

from __future__ import annotations

import copy
import random
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import tiny_runs
import torch

from igrpo_nemo.config import load_config
from igrpo_nemo.config.checks import check_launch
from igrpo_nemo.errors import NonFiniteError, UserError
from igrpo_nemo.local.learner import Learner
from igrpo_nemo.local.warmup import build_small_model
from igrpo_nemo.run.tokenizer import build_small_tokenizer
from igrpo_nemo.types import Completion, Stage, StopReason, TrainingRow

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def initial():
    tokenizer = build_small_tokenizer(["some text"], 262)
    shape = tiny_runs.SHAPE.model_copy(update={"initializer_range": 0.2})
    return build_small_model(shape, tokenizer, context=128, seed=1)


@pytest.fixture(scope="module")
def rows():
    rng = random.Random(0)

    def ids(length):
        return tuple(rng.randrange(262) for _ in range(length))

    result = []
    for group in range(4):
        context = ids(rng.randint(5, 20))
        for _ in range(4):
            completion = Completion("", ids(rng.randint(1, 9)), (), StopReason.EOS)
            reward = float(rng.choice((0, 1, 2)))
            result.append(TrainingRow(str(group), Stage.REFINE, context, completion, reward))
    return result


@cache
def demo():
    """16 rows a step, as `rows` gives."""
    sizes = ["grpo.num_prompts_per_step=4", "igrpo.num_drafts=4", "igrpo.num_refinements=4"]
    plain = [f"policy.generation.temperature={TEMPERATURE}", "policy.max_grad_norm=null"]
    return load_config(["experiment=demo", *sizes, *plain])


def configured(**values):
    """The demo's config with the values of dotted keys, written with __ for dots."""
    config = demo()
    for name, value in values.items():
        section, _, key = name.rpartition("__")
        config = config.replaced(section.replace("__", "."), **{key: value})
    return config


def learner_of(model, reference=None, **values):
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    return Learner(model, optimizer, scheduler, configured(**values), reference=reference)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def naive_loss(model, rows):
    """Eq. 5 at ratio 1, row by row through the model's own forward pass."""
    groups = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row.reward)
    total = torch.zeros(())
    for row in rows:
        rewards = torch.tensor(groups[row.group])
        std = rewards.std()
        advantage = (row.reward - rewards.mean()) / (std + 1e-6) if std > 0 else torch.zeros(())
        ids = torch.tensor([[*row.context_ids, *row.completion.token_ids]])
        logits = model(ids).logits[0] / TEMPERATURE
        first = len(row.context_ids)
        logprobs = logits.log_softmax(-1)[first - 1 : -1]
        chosen = logprobs.gather(1, ids[0, first:, None])[:, 0]
        ratio = (chosen - chosen.detach()).exp()
        total = total - (ratio * advantage).mean() / len(rows)
    return total


def test_an_update_is_a_step_along_the_gradient_of_eq_5(initial, rows):
    learner = learner_of(initial)
    metrics = learner.update(rows)
    naive = copy.deepcopy(initial)
    loss = naive_loss(naive, rows)
    loss.backward()
    torch.optim.SGD(naive.parameters(), lr=0.1).step()
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-6)
    moved = (weights(naive) - weights(initial)).norm()
    assert (weights(learner.model) - weights(naive)).norm() < 1e-5 * moved


@pytest.mark.parametrize(
    "pieces",
    [
        {"policy__sequence_packing__train_mb_tokens": 40},
        {"policy__sequence_packing__train_mb_tokens": 1},
        {"policy__sequence_packing__enabled": False, "policy__train_micro_batch_size": 16},
        {"policy__sequence_packing__enabled": False, "policy__train_micro_batch_size": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("token_level", [False, True])
def test_how_rows_are_cut_changes_memory_and_nothing_else(
    initial, rows, pieces, updates, token_level
):
    objective = {
        "loss_fn__ratio_clip_max": 0.28,
        "loss_fn__token_level_loss": token_level,
        "igrpo__updates_per_rollout": updates,
    }
    whole = learner_of(initial, **objective)
    cut = learner_of(initial, **objective, **pieces)
    expected, measured = whole.update(rows), cut.update(rows)
    assert measured == pytest.approx(expected, abs=2e-6, rel=1e-4)
    assert (weights(cut.model) - weights(whole.model)).abs().max() < 1e-6


def test_several_updates_have_ratios_off_one(initial, rows):
    metrics = learner_of(initial, igrpo__updates_per_rollout=4).update(rows)
    assert metrics["policy/ratio_max"] > 1.0001
    assert learner_of(initial).update(rows)["policy/ratio_max"] == 1.0


@pytest.mark.parametrize("count", [0, 1, 3, 5, 9, 13, 16])
def test_every_rollout_takes_the_updates_that_the_schedule_counts_on(initial, rows, count):
    """Skipped problems and filtered rows leave fewer; a row is in one update, never in none."""
    from dataclasses import replace

    learner = learner_of(initial, igrpo__updates_per_rollout=4, grpo__overlong_filtering=True)
    cut = [replace(row.completion, stop_reason=StopReason.LENGTH) for row in rows]
    marked = [row if i < count else replace(row, completion=cut[i]) for i, row in enumerate(rows)]
    taken = []
    learner.optimizer.register_step_post_hook(lambda *_: taken.append(None))
    learner.update(marked)
    assert len(taken) == min(4, count)
    assert learner.scheduler.last_epoch == 4
    sizes = [len(indices) for indices in learner._minibatches(count)] if count else []
    assert sum(sizes) == count and (not sizes or max(sizes) - min(sizes) <= 1)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("weight", "mean log-prob is nan"),
        ("reference", "loss is nan"),
        ("gradient", "gradient's norm is inf"),
    ],
)
def test_what_is_not_finite_ends_the_run_and_changes_nothing(initial, rows, damage, named):
    reference = copy.deepcopy(initial)
    learner = learner_of(initial, reference, loss_fn__reference_policy_kl_penalty=0.1)
    first = next((reference if damage == "reference" else learner.model).parameters())
    if damage == "gradient":
        first.register_hook(lambda grad: grad * torch.inf)
    else:
        with torch.no_grad():
            first[5] = torch.inf
    before = weights(learner.model)
    with pytest.raises(NonFiniteError, match=named):
        learner.update(rows)
    assert torch.equal(weights(learner.model), before)


def test_overlong_filtering_keeps_the_baseline_and_drops_the_row(initial, rows):
    from dataclasses import replace

    truncated = replace(rows[0].completion, stop_reason=StopReason.LENGTH)
    marked = [replace(rows[0], completion=truncated), *rows[1:]]
    filtered, plain = learner_of(initial, grpo__overlong_filtering=True), learner_of(initial)
    filtered.update(marked)
    plain.update(marked)
    assert (weights(filtered.model) - weights(plain.model)).abs().max() > 1e-6
    nothing = [replace(row, completion=truncated) for row in rows]
    idle = learner_of(initial, grpo__overlong_filtering=True)
    idle.optimizer.step()  # PyTorch warns about a schedule that is stepped before its optimizer
    assert idle.update(nothing)["grad_norm"] == 0.0
    assert torch.equal(weights(idle.model), weights(initial))


def test_stopping_between_micro_batches_leaves_everything_as_it_was(initial, rows):
    class Stop(Exception):
        pass

    learner = learner_of(initial, policy__sequence_packing__train_mb_tokens=40)
    calls = []

    def stop_at_third():
        calls.append(1)
        if len(calls) == 3:
            raise Stop

    learner.between_micro_batches = stop_at_third
    with pytest.raises(Stop):
        learner.update(rows)
    assert torch.equal(weights(learner.model), weights(initial))
    learner.between_micro_batches = lambda: None
    learner.update(rows)
    whole = learner_of(initial, policy__sequence_packing__train_mb_tokens=40)
    whole.update(rows)
    assert torch.equal(weights(learner.model), weights(whole.model))


def test_a_restored_learner_goes_on_bit_for_bit(initial, rows):
    def adam(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        return Learner(model, optimizer, scheduler, demo())

    whole = adam(copy.deepcopy(initial))
    for _ in range(3):
        whole.update(rows)
    saved, middle = copy.deepcopy(whole.state_dict()), copy.deepcopy(whole.model)
    whole.update(rows)
    restored = adam(middle)
    restored.load_state_dict(saved)
    restored.update(rows)
    assert torch.equal(weights(restored.model), weights(whole.model))


def test_an_objective_of_ones_own_is_named_by_its_path(initial, rows):
    """Without a clip, and with one update, the gradient is that of Eq. 5."""
    here = Path(__file__).parents[2] / "docs" / "method.md"
    [written] = re.findall(r"^```python\n(def reinforce.*?)^```", here.read_text(), re.M | re.S)
    module = ModuleType("own_objective")
    exec(written, vars(module))
    module.narrow = lambda inputs, config: inputs.advantages_R
    with mock.patch.dict(sys.modules, own_objective=module):
        plain, own = (
            learner_of(initial),
            learner_of(initial, igrpo__objective="own_objective:reinforce"),
        )
        plain.update(rows)
        own.update(rows)
        moved = (weights(plain.model) - weights(initial)).norm()
        assert (weights(own.model) - weights(plain.model)).norm() < 1e-5 * moved
        with pytest.raises(UserError, match="igrpo.objective returned a tensor of shape"):
            learner_of(initial, igrpo__objective="own_objective:narrow").update(rows)
        path = "igrpo.objective=own_objective:"
        with pytest.raises(UserError, match="igrpo.objective='own_objective:none' cannot be imp"):
            load_config(["experiment=demo", f"{path}none"])
        for key, said in {
            "use_importance_sampling_correction=true": "is not weighted by loss_fn.use_imp.*=true",
            "positive_example_nll_weight=0.1": "stands in the place of loss_fn.positive_ex.*=0.1",
        }.items():
            words = ["experiment=demo", "engine=nemo_rl_local", f"{path}reinforce"]
            check_launch(load_config(words))
            with pytest.raises(UserError, match=f"igrpo.objective=.*{said}: set it to "):
                check_launch(load_config([*words, f"loss_fn.{key}"]))


def test_a_kl_penalty_needs_the_reference_policy(initial):
    with pytest.raises(ValueError, match="reference policy"):
        learner_of(initial, loss_fn__reference_policy_kl_penalty=0.1)

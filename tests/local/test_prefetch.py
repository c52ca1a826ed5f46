"""Fused draft prefetch: what is and is not on-policy, off and resume to the last bit."""

from __future__ import annotations

import dataclasses
import signal

import pytest
import tiny_runs
import torch
from tiny_runs import learned, same_weights, texts

from igrpo_nemo.config import load_config
from igrpo_nemo.data.order import EpochOrder, Position
from igrpo_nemo.errors import UserError
from igrpo_nemo.local.model import load_model
from igrpo_nemo.local.packing import completion_logprobs
from igrpo_nemo.local.prefetch import DraftsAhead
from igrpo_nemo.local.sampler import Sampler
from igrpo_nemo.local.step_batches import StepBatches
from igrpo_nemo.types import Completion, Group, Problem, Prompt, Rollout, Score, Stage, StopReason
from igrpo_nemo.types import TrainingRow as Row

FUSED = "igrpo.draft_prefetch=fused"


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny_runs.tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def fused(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused") / "run"
    return tiny_runs.run(tiny_runs.tiny_config(policy, folder, FUSED)), folder


def _largest_gap(policy, weights, groups):
    """Between the log-probs of a group's completions as sampled and under these weights."""
    model = load_model(policy, device="cpu", precision="float32")
    model.load_state_dict(weights)
    rows = [
        Row("g", group.stage, group.prompt.token_ids, completion, 0.0)
        for group in groups
        for completion in group.completions
    ]
    with torch.no_grad():
        batch = completion_logprobs(model, rows, temperature=1.0)
    return max(
        abs(sampled - exact)
        for row, exact_T in zip(rows, batch.logprobs_RT.tolist(), strict=True)
        for sampled, exact in zip(row.completion.logprobs, exact_T, strict=False)
    )


def test_refinements_are_on_policy_and_drafts_one_step_behind(policy, fused):
    """Two epochs of three steps: the first step of each drafts afresh."""
    seen, folder = fused
    assert seen.code == 0 and len(seen.rollouts) == 6
    for step, (rollouts, weights) in enumerate(zip(seen.rollouts, seen.weights, strict=True)):
        drafts = [rollout.drafts for rollout in rollouts]
        refinements = [group for rollout in rollouts for group in rollout.refinements]
        assert _largest_gap(policy, weights, refinements) < 1e-5
        fresh = step % 3 == 0
        made = seen.weights[step if fresh else step - 1]
        assert _largest_gap(policy, made, drafts) < 1e-5
        if not fresh:
            assert _largest_gap(policy, weights, drafts) > 1e-4
    metrics = learned(folder)
    assert [each["igrpo/draft_staleness"] for each in metrics] == [0, 1, 1] * 2
    assert [each["igrpo/drafts_prefetched"] for each in metrics] == [0, 1, 1] * 2
    assert [each["igrpo/drafts_dropped"] for each in metrics] == [0] * 6
    for step, each in enumerate(metrics):
        best = each[f"igrpo/best_draft_reward_stale_{int(step % 3 > 0)}"]
        assert best == each["igrpo/best_draft_reward"]


def test_off_is_as_if_there_were_no_such_option(policy, tmp_path, fused):
    off = tiny_runs.run(tiny_runs.tiny_config(policy, tmp_path / "off"))
    assert not any("prefetch" in name or "stale" in name for name in learned(tmp_path / "off")[0])
    # The first step has nothing to prefetch: both runs begin alike, and part from there.
    assert texts(off.rollouts[0]) == texts(fused[0].rollouts[0])
    assert same_weights(off.weights[1], fused[0].weights[1])
    assert not same_weights(off.final, fused[0].final)


def test_with_one_batch_an_epoch_fused_is_off_to_the_last_bit(policy, tmp_path):
    runs = [
        tiny_runs.run(
            tiny_runs.tiny_config(
                policy,
                tmp_path / mode,
                f"igrpo.draft_prefetch={mode}",
                "data.train.num_problems=4",
                "grpo.max_num_epochs=3",
            )
        )
        for mode in ("off", "fused")
    ]
    assert len(runs[0].rollouts) == 3
    assert same_weights(runs[0].final, runs[1].final)


def test_draws_have_the_names_that_they_have_without_prefetch(policy, tmp_path):
    """While the weights stay as they are, both ways sample the same completions."""
    frozen = "policy.optimizer.kwargs.lr=1.0e-30"
    off, fused = (
        tiny_runs.run(
            tiny_runs.tiny_config(policy, tmp_path / mode, f"igrpo.draft_prefetch={mode}", frozen)
        )
        for mode in ("off", "fused")
    )
    assert [texts(each) for each in off.rollouts] == [texts(each) for each in fused.rollouts]


@pytest.mark.parametrize("crash", [2, 3, 5])
def test_a_crashed_run_ends_bit_for_bit_like_the_whole_one(policy, tmp_path, fused, crash):
    config = tiny_runs.tiny_config(policy, tmp_path / "run", FUSED)

    def die(step):
        if step == crash:
            raise MemoryError

    with pytest.raises(MemoryError):
        tiny_runs.run(config, before_update=die)
    resumed = tiny_runs.run(config)
    assert [texts(e) for e in resumed.rollouts] == [
        texts(e) for e in fused[0].rollouts[crash - 1 :]
    ]
    assert same_weights(resumed.final, fused[0].final)
    assert learned(tmp_path / "run") == learned(fused[1])


@pytest.mark.parametrize("where", ["sampling", "learning"])
def test_a_stop_in_the_middle_of_a_step_saves_the_drafts_that_it_took(
    policy, tmp_path, fused, monkeypatch, where
):
    """Not those that it was making, or had made: the step is done again."""
    calls, sample = [], Sampler.sample

    def sampled(sampler, *args, **options):
        calls.append(None)
        # Step 1 drafts and refines; from then on there is one call a step: this one is step 3's.
        if where == "sampling" and len(calls) == 4:
            signal.raise_signal(signal.SIGTERM)
        return sample(sampler, *args, **options)

    def before_update(number):
        if where == "learning" and number == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Sampler, "sample", sampled)
    config = tiny_runs.tiny_config(policy, tmp_path / "run", FUSED, "checkpointing.save_period=100")
    assert tiny_runs.run(config, before_update=before_update).code == 75
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]
    monkeypatch.undo()
    assert same_weights(tiny_runs.run(config).final, fused[0].final)


def test_trained_drafts_cannot_be_prefetched():
    for train_stages, fine in (("[refine]", True), ("[draft,refine]", False)):
        overrides = ["experiment=demo", FUSED, f"igrpo.train_stages={train_stages}"]
        if fine:
            load_config(overrides)
        else:
            with pytest.raises(UserError, match=r"too old to be trained on: .* must be \[refine\]"):
                load_config(overrides)


def test_without_a_second_stage_the_option_has_no_effect(policy, tmp_path):
    base = ["feedback=none", "grpo.max_num_steps=2"]
    runs = [
        tiny_runs.run(tiny_runs.tiny_config(policy, tmp_path / mode, *base, f"{key}={mode}"))
        for key, mode in (("igrpo.draft_prefetch", "off"), ("igrpo.draft_prefetch", "fused"))
    ]
    assert same_weights(runs[0].final, runs[1].final)
    assert not any("stale" in name for name in learned(tmp_path / "fused")[0])


PROBLEMS = [Problem(f"p{n}", "q", "a") for n in range(10)]
ORDER = EpochOrder(10, batch_size=2, seed=0, shuffle=False)


class FakeRollout:
    """Records what it is asked for; the text of a draft is the step and draw that made it."""

    def __init__(self):
        self.calls = []

    def __call__(self, problems, *, step, draw=0, drafts=None, ahead=None):
        self.calls.append((step, draw, drafts is not None, ahead and (ahead.step, ahead.draw)))
        if ahead is not None:
            ahead.drafts = tuple((_completion(f"{step}/{draw}"),) for _ in ahead.problems)
        drafts = drafts or tuple((_completion("fresh"),) for _ in problems)
        return [
            Rollout(p, Group(p, Stage.DRAFT, Prompt("", (1,)), rows, (Score(0.0),) * len(rows)))
            for p, rows in zip(problems, drafts, strict=True)
        ]


def _completion(text):
    return Completion(text, (1, 2), (-0.1, -1 / 3), StopReason.EOS)


def _step(number, position, ahead, **options):
    rollout = FakeRollout()
    return rollout, StepBatches(
        ORDER, PROBLEMS, rollout, step=number, position=position, ahead=ahead, **options
    )


def test_redraws_of_a_step_use_drafts_made_in_that_step():
    fused = {"prefetch": True, "redraws": True}
    rollout, batches = _step(1, Position(), None, **fused)
    drawn = [batches.roll_out(0), batches.roll_out(1)]
    assert [r.drafts.completions[0].text for each in drawn for r in each] == [
        "fresh",
        "fresh",
        "1/0",
        "1/0",
    ]
    metrics = batches.prefetch_metrics(0)
    assert metrics["igrpo/draft_staleness"] == 0 and metrics["igrpo/drafts_prefetched"] == 0.5
    following, second = _step(2, batches.position, batches.ahead, **fused)
    second.roll_out(0)
    assert second.prefetch_metrics(0)["igrpo/draft_staleness"] == 1
    # No two draws of drafts have the same step and draw, whichever step they end up in.
    assert [call[3] for call in rollout.calls + following.calls] == [(1, 1), (1, 2), (2, 1)]
    assert following.calls[0][:3] == (2, 0, True)


def test_nothing_is_drafted_beyond_an_epoch_or_where_it_is_not_wanted():
    rollout, batches = _step(5, Position(0, 8), None, prefetch=True)
    batches.roll_out()
    assert batches.ahead is None and rollout.calls == [(5, 0, False, None)]
    rollout, batches = _step(1, Position(), None)
    batches.roll_out()
    assert batches.ahead is None and batches.position == Position(0, 2)


def test_drafts_of_other_problems_are_dropped_and_counted():
    _, batches = _step(1, Position(), None, prefetch=True)
    batches.roll_out()
    assert batches.ahead is not None and batches.ahead.problem_ids == ("p2", "p3")
    others = dataclasses.replace(batches.ahead, problem_ids=("p2", "changed"))
    rollout, second = _step(2, batches.position, others)
    second.roll_out()
    assert rollout.calls == [(2, 0, False, None)] and second.dropped == 2
    assert second.prefetch_metrics(second.dropped) == {
        "igrpo/draft_staleness": 0,
        "igrpo/drafts_prefetched": 0,
        "igrpo/drafts_dropped": 2,
    }


def test_drafts_survive_a_checkpoint_to_the_last_bit(tmp_path):
    rows = (
        (Completion("é\x00", (5, 6, 7), (-1e-9, -0.1, -12.5), StopReason.LENGTH), _completion("")),
        (Completion("", (2,), (0.0,), StopReason.STOP_STRING),),
    )
    drafts = DraftsAhead(Position(1, 4), ("a", "b"), rows, made_at=7)
    torch.save(drafts.state_dict(), tmp_path / "drafts.pt")
    loaded = torch.load(tmp_path / "drafts.pt", weights_only=True)
    assert DraftsAhead.from_state(loaded) == drafts

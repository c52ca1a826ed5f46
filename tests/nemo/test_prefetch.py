"""Fused draft prefetch: the lookahead loader, and what is and is not on-policy in a real run."""

from __future__ import annotations

import copy

import nemo_runs
import pytest
import torch
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from torchdata.stateful_dataloader import StatefulDataLoader

from igrpo_nemo.nemo.prefetch import BATCH_NUMBER, LookaheadLoader, Prefetcher
from igrpo_nemo.nemo.seam import StepClock


def _collate(rows):
    return BatchedDataDict({"message_log": [[] for _ in rows], "number": list(rows)})


def _loader(workers):
    torch.manual_seed(3)
    return StatefulDataLoader(
        list(range(11)),
        batch_size=2,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        collate_fn=_collate,
    )


def _read(loader, epochs):
    """Batches and the state behind each, epoch by epoch."""
    seen = []
    for _ in range(epochs):
        for batch in loader:
            seen.append((batch["number"], copy.deepcopy(loader.state_dict())))
    return seen


@pytest.mark.parametrize("workers", [0, 2])
def test_the_lookahead_loader_is_the_plain_one(workers):
    """Same batches over three epochs, and a resume from any of its states continues alike."""
    plain = _read(_loader(workers), 3)
    ahead = _read(LookaheadLoader(_loader(workers)), 3)
    assert [numbers for numbers, _ in ahead] == [numbers for numbers, _ in plain]
    assert len(plain) == 15
    for place in (0, 2, 6):
        resumed = _loader(workers)
        resumed.load_state_dict(ahead[place][1])
        rest = next(iter(LookaheadLoader(resumed)))
        assert rest["number"] == plain[place + 1][0]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_state_behind_the_data_begins_the_next_epoch(workers):
    """As the plain loader's: a run that ended with its data can be given more of it."""
    epochs = {}
    for kind in (lambda inner: inner, LookaheadLoader):
        used_up = kind(_loader(workers))
        assert len(list(used_up)) == 5
        resumed = _loader(workers)
        resumed.load_state_dict(used_up.state_dict())
        resumed = kind(resumed)
        epochs[kind] = [[batch["number"] for batch in resumed] for _ in range(2)]
    plain, ahead = epochs.values()
    assert [len(epoch) for epoch in plain] == [5, 5]
    assert ahead == plain


def test_the_lookahead_loader_knows_what_follows():
    loader = LookaheadLoader(_loader(0))
    assert len(loader) == 5
    previous = None
    for batch in loader:
        if previous is not None:
            assert previous["number"] == batch["number"]
            assert batch[BATCH_NUMBER] == previous[BATCH_NUMBER]
        previous = loader.upcoming
    assert previous is None


def test_drafts_of_another_batch_are_dropped_and_counted():
    loader = LookaheadLoader(_loader(0))
    prefetcher = Prefetcher(loader, StepClock(), total_steps=9)
    batch = next(iter(loader))
    assert prefetcher.take(batch) is None
    prefetcher._kept = (99, ((),), 0)
    assert prefetcher.take(batch) is None
    assert prefetcher.dropped == 1


def _versions(monkeypatch):
    """Which policy version sampled each (prompt, completion)."""
    from igrpo_nemo.nemo.cpu.generation import LocalGeneration

    made = {}
    original = LocalGeneration._sample

    def sample(generation, prompts, greedy, *, together=False):
        completions = original(generation, prompts, greedy, together=together)
        for prompt, completion in zip(prompts, completions, strict=True):
            made.setdefault((prompt, completion.token_ids), set()).add(generation.version)
        return completions

    monkeypatch.setattr(LocalGeneration, "_sample", sample)
    return made


def _stages_versions(seen, made, stage):
    """Per step, the versions that may have made its drafts or its refinements."""
    found = []
    for call in seen.rollouts:
        groups = [r.drafts if stage == "draft" else r.refinements[0] for r in call]
        found.append([made[g.prompt.token_ids, c.token_ids] for g in groups for c in g.completions])
    return found


@nemo_runs.ENGINES
def test_drafts_are_one_update_behind_and_refinements_never(
    ray_cluster, policy_folder, tmp_path, monkeypatch, engine
):
    """Two epochs of two steps: the first step of each drafts afresh."""
    made = _versions(monkeypatch)
    config = nemo_runs.tiny_config(
        policy_folder,
        tmp_path / "run",
        "data.train.num_problems=16",
        "grpo.max_num_epochs=2",
        "grpo.max_num_steps=9",
        "igrpo.draft_prefetch=fused",
        engine,
    )
    seen = nemo_runs.train(config)
    logged = nemo_runs.metrics(tmp_path / "run")
    assert [each["igrpo/draft_staleness"] for each in logged] == [0, 1, 0, 1]
    assert [each["igrpo/drafts_prefetched"] for each in logged] == [0, 1, 0, 1]
    assert [each["igrpo/drafts_dropped"] for each in logged] == [0] * 4
    assert "igrpo/best_draft_reward_stale_1" in logged[1]
    for step, drafts in enumerate(_stages_versions(seen, made, "draft")):
        wanted = step - 1 if step % 2 else step
        assert all(wanted in versions for versions in drafts)
    for step, refinements in enumerate(_stages_versions(seen, made, "refine")):
        assert all(step in versions for versions in refinements)


def test_a_run_that_is_made_longer_drafts_afresh_and_gets_the_schedule_of_its_length(
    ray_cluster, policy_folder, tmp_path
):
    changes = ["checkpointing.enabled=true", "checkpointing.save_period=2"]
    changes += ["igrpo.draft_prefetch=fused", "igrpo.schedule.decay=linear"]
    for steps in (2, 4):
        longer = f"grpo.max_num_steps={steps}"
        config = nemo_runs.tiny_config(policy_folder, tmp_path, *changes, longer)
        nemo_runs.train(config)
    logged = nemo_runs.metrics(tmp_path)
    assert [each["igrpo/draft_staleness"] for each in logged] == [0, 1, 0, 1]
    peak, floor = config.policy.optimizer.kwargs.lr, config.igrpo.schedule.min_lr_ratio
    falls = [0 / 2, 1 / 2, 2 / 4, 3 / 4]
    assert [each["lr"] for each in logged] == pytest.approx(
        [peak * (1 - fall * (1 - floor)) for fall in falls]
    )


def test_with_nothing_ahead_fused_is_bit_identical_to_off(ray_cluster, policy_folder, tmp_path):
    """One batch an epoch: every step drafts afresh, so both runs must agree to the last bit."""
    base = ["data.train.num_problems=8", "grpo.max_num_epochs=2"]
    weights = []
    for mode in ("off", "fused"):
        config = nemo_runs.tiny_config(
            policy_folder, tmp_path / mode, *base, f"igrpo.draft_prefetch={mode}"
        )
        [policy] = nemo_runs.train(config).policies
        weights.append(policy.model.state_dict())
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])

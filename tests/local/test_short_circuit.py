"""Stage 1 that ends early: the same choice of draft as without it, and what it gives up."""

from __future__ import annotations

import threading
import time

import pytest
import tiny_runs
from tiny_runs import TextScorer, learned, same_weights

from igrpo_nemo.config import load_config
from igrpo_nemo.environment import TwoStageEnvironment
from igrpo_nemo.errors import UserError
from igrpo_nemo.feedback import BestDraft
from igrpo_nemo.local import draft_watch
from igrpo_nemo.local.rollout import TwoStageRollout
from igrpo_nemo.local.sampler import Sampler, SampleRequest, SamplingParams
from igrpo_nemo.prompts import PromptBuilder, PromptProfile, TokenBudget
from igrpo_nemo.short_circuit import ShortCircuit
from igrpo_nemo.types import Completion, Problem, Score, StopReason

PROBLEMS = [Problem(f"p{n}", f"{n}+{n}=", "0") for n in range(5)]
PARAMS = SamplingParams(24, stop_token_ids=tuple(range(3, 320, 16)))


@pytest.mark.parametrize(
    ("unbeatable", "index_order", "first"),
    [
        ([None, None, None], [], []),
        ([False, None, None], [], []),
        ([None, True, None], [2], [0, 2]),
        ([False, True, None], [2], [2]),
        ([True, None, True, None], [1, 3], [1, 3]),
        ([None, True, True, None], [3], [0, 3]),
        ([False, True, False], [], []),
    ],
)
def test_what_no_longer_matters(unbeatable, index_order, first):
    assert ShortCircuit("index_order", 1.0).given_up(unbeatable) == index_order
    assert ShortCircuit("first", 1.0).given_up(unbeatable) == first


def test_a_truncated_draft_ends_nothing_where_finished_ones_rank_above_it():
    cut = Completion("", (1,), (0.0,), StopReason.LENGTH)
    whole = Completion("", (1,), (0.0,), StopReason.STOP_STRING)
    rule = ShortCircuit("first", 1.0)
    assert not rule.unbeatable(cut, Score(1.0)) and rule.unbeatable(whole, Score(1.0))
    assert not rule.unbeatable(whole, Score(0.9))
    assert ShortCircuit("first", 1.0, finished_only=False).unbeatable(cut, Score(1.0))


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("qwen2")


@pytest.fixture
def roll_out(model, tokenizer):
    """roll_out(mode, step) with six drafts of each of five problems."""

    def roll_out(mode, step, *, scorer=None, params=PARAMS, max_batch_rows=None):
        prompts = PromptBuilder(tokenizer, PromptProfile("S", "\n", "draft"), TokenBudget(128, 24))
        environment = TwoStageEnvironment(prompts, scorer or TextScorer(), BestDraft(6, 2))
        sampler = Sampler(model, tokenizer, max_batch_rows=max_batch_rows)
        rule = ShortCircuit(mode, best_reward=2.0)
        return TwoStageRollout(environment, sampler, params, 0, short_circuit=rule)(
            PROBLEMS, step=step
        )

    return roll_out


def _shown(rollout):
    """The draft that was chosen, and what came of it."""
    draft = rollout.drafts.completions[rollout.selection.index]
    return draft.token_ids, draft.stop_reason, rollout.refinements


def _finished(rollouts):
    return sum(len(rollout.drafts.completions) for rollout in rollouts)


@pytest.mark.parametrize(("waves", "seeds"), [(128, range(25)), (6, range(25, 40))])
def test_index_order_chooses_as_if_all_drafts_were_finished(roll_out, monkeypatch, waves, seeds):
    """Over 40 seeds of 5 problems: draft, q' and refinements are those of `off`, bit for bit."""
    monkeypatch.setattr(draft_watch, "_WAVES", waves)
    finished = 0
    for step in seeds:
        full, short = roll_out("off", step), roll_out("index_order", step)
        for one, other in zip(full, short, strict=True):
            assert _shown(one) == _shown(other)
            known = [completion.token_ids for completion in one.drafts.completions]
            kept = [completion.token_ids for completion in other.drafts.completions]
            assert [ids for ids in known if ids in kept] == kept, "finished drafts are in order"
            # All drafts before the chosen one were waited for.
            index = one.selection.index
            assert other.selection.index == index and kept[: index + 1] == known[: index + 1]
        finished += _finished(short)
    assert finished < 0.9 * len(seeds) * 5 * 6, "drafts should have been given up"


def test_first_waits_for_nobody_and_still_shows_a_draft_of_the_highest_reward(roll_out):
    first = exact = 0
    for step in range(10):
        rollouts, full = roll_out("first", step), roll_out("off", step)
        first += _finished(rollouts)
        exact += _finished(roll_out("index_order", step))
        for one, other in zip(rollouts, full, strict=True):
            chosen = one.drafts.scores[one.selection.index].reward
            assert chosen == max(other.drafts.rewards)
    assert first < exact


def test_drafts_end_within_two_waves_of_the_winner(roll_out, monkeypatch):
    """Waves of three steps: what is still running at the second one after the winner has left."""
    monkeypatch.setattr(draft_watch, "_WAVES", 8)
    cut = 0
    for step in range(10):
        for rollout in roll_out("first", step):
            group = rollout.drafts
            ends = [len(completion.token_ids) for completion in group.completions]
            pairs = zip(group.completions, group.scores, strict=True)
            won = [len(c.token_ids) for c, s in pairs if s.reward == 2.0 and not c.truncated]
            if won:
                assert max(ends) <= min(won) + 6
            cut += len(ends) < 6
    assert cut > 5


def test_scoring_does_not_stop_sampling_and_its_speed_changes_nothing(roll_out):
    class Slow(TextScorer):
        threads: set[str] = set()

        def __call__(self, requests):
            self.threads.add(threading.current_thread().name)
            time.sleep(0.002 * (len(requests) % 3))
            return super().__call__(requests)

    slow, fast = roll_out("first", 3, scorer=Slow()), roll_out("first", 3)
    assert slow == fast
    assert any(name.startswith("draft-scores") for name in Slow.threads)
    assert not any(t.name.startswith("draft-scores") for t in threading.enumerate())


def test_a_scorer_that_fails_fails_the_rollout(roll_out):
    class Broken(TextScorer):
        def __call__(self, requests):
            raise RuntimeError("the verifier is gone")

    with pytest.raises(RuntimeError, match="the verifier is gone"):
        roll_out("index_order", 0, scorer=Broken())
    assert not any(t.name.startswith("draft-scores") for t in threading.enumerate())


def test_drafts_that_have_not_begun_never_do(roll_out):
    """In batches of four rows the last drafts of a group wait for the first ones."""
    waiting = roll_out("index_order", 1, max_batch_rows=4)
    together = roll_out("index_order", 1)
    assert [_shown(one)[:2] for one in waiting] == [_shown(one)[:2] for one in together]
    assert _finished(waiting) < _finished(together)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("max_rows", [None, 3])
def test_given_up_rows_leave_and_the_others_stay_as_they_are(fused, max_rows, model, tokenizer):
    requests = [SampleRequest((5, 6, 7), 4, "a"), SampleRequest((9, 8), 3, "b")]
    whole = Sampler(model, tokenizer, fused=fused).sample(requests, PARAMS)
    seen, progress = [], []

    def watch(ended):
        first = bool(ended) and not seen
        seen.extend((each.request, each.number) for each in ended)
        return [(0, 2), (1, 0), (1, 1)] if first else []

    short = Sampler(model, tokenizer, fused=fused, max_batch_rows=max_rows).sample(
        requests, PARAMS, watch=watch, on_progress=lambda *done: progress.append(done)
    )
    ids = [[completion.token_ids for completion in rows] for rows in short]
    wanted = [
        [row.token_ids for n, row in enumerate(rows) if (request, n) in seen]
        for request, rows in enumerate(whole)
    ]
    assert ids == wanted
    assert len(seen) == sum(map(len, ids)) < 7
    if max_rows:  # In batches of three these two had not begun.
        assert not {(1, 0), (1, 1)} & set(seen)
    assert progress[-1] == (7, 7)


def test_a_run_learns_the_same_and_measures_finished_drafts_alone(tmp_path):
    policy = tiny_runs.tiny_policy(tmp_path / "policy")
    runs = {
        mode: tiny_runs.run(
            tiny_runs.tiny_config(
                policy, tmp_path / mode, f"igrpo.short_circuit={mode}", "grpo.max_num_steps=3"
            )
        )
        for mode in ("off", "index_order")
    }
    assert same_weights(runs["off"].final, runs["index_order"].final)
    off, short = learned(tmp_path / "off"), learned(tmp_path / "index_order")
    assert "igrpo/drafts_given_up" not in off[0]
    assert sum(each["igrpo/drafts_given_up"] for each in short) > 0
    for before, after, rollouts in zip(off, short, runs["index_order"].rollouts, strict=True):
        drafts = [c for rollout in rollouts for c in rollout.drafts.completions]
        assert after["igrpo/draft_tokens"] == sum(len(c.token_ids) for c in drafts) / len(drafts)
        assert after["igrpo/drafts_given_up"] == 4 - len(drafts) / 4
        for name in ("igrpo/best_draft_reward", "igrpo/refinement_reward", "loss", "grad_norm"):
            assert before[name] == after[name]


REFUSALS = [
    (["igrpo.draft_prefetch=fused"], "exclude each other"),
    (["igrpo.tie_break=random"], "needs igrpo.draft_choice=best and igrpo.tie_break=first"),
    (["igrpo.draft_choice=worst"], "needs igrpo.draft_choice=best"),
    (["igrpo.train_stages=[draft,refine]"], r"must be \[refine\]"),
    (["reward=judge", "igrpo.judge.model=m"], "a judge is too slow for"),
]


@pytest.mark.parametrize(("overrides", "reason"), REFUSALS)
def test_what_makes_no_sense_is_refused(overrides, reason):
    with pytest.raises(UserError, match=reason):
        load_config(["experiment=demo", "igrpo.short_circuit=index_order", *overrides])

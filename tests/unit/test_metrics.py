"""Step metrics on rollouts small enough to count by hand, pass@k by enumeration, Proposition 3.1
by simulation."""

import itertools
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace

import pytest
from cases import cases

from igrpo_nemo.metrics import (
    best_draft_prediction,
    mean_and_stderr,
    pass_at_k,
    prefetch_metrics,
    rollout_metrics,
)
from igrpo_nemo.types import (
    Completion,
    Group,
    Problem,
    Prompt,
    Rollout,
    Score,
    Selection,
    Stage,
    StopReason,
    Target,
    TrainingRow,
)

CASES = cases(__file__)

EOS = 2
RIGHT = Score(2.0, {"accuracy": 1.0, "format": 1.0}, "match")
UNFORMATTED = Score(1.0, {"accuracy": 1.0, "format": 0.0}, "match")
WRONG = Score(1.0, {"accuracy": 0.0, "format": 1.0}, "mismatch")
NOTHING = Score(0.0, {"accuracy": 0.0, "format": 0.0}, "no_answer")

COMPARED = {
    f"igrpo/{name}"
    for name in ("lift", "refinement_better", "refinement_worse", "mended", "kept_right")
    + ("copy_rate", "overlap", "draft_clipped_rate")
}
REFINEMENT_ONLY = COMPARED | {"igrpo/refine_prompt_tokens"}
REFINEMENT_ONLY |= {
    f"igrpo/refinement_{name}"
    for name in ("reward", "accuracy", "format", "truncated_rate", "tokens")
}
SELECTED_ONLY = {"igrpo/selected_draft_reward", "igrpo/selected_draft_accuracy"}


def completion(text: str, ends: bool = True) -> Completion:
    ids = tuple(ord(letter) for letter in text) + ((EOS,) if ends else ())
    reason = StopReason.EOS if ends else StopReason.LENGTH
    return Completion(text, ids, (-0.5,) * len(ids), reason)


def group(
    name: str,
    stage: Stage,
    texts: Sequence[str],
    scores: Sequence[Score],
    prompt_tokens: int = 10,
    dropped: int = 0,
    unfinished: Sequence[int] = (),
) -> Group:
    completions = tuple(completion(text, i not in unfinished) for i, text in enumerate(texts))
    prompt = Prompt("p", tuple(range(prompt_tokens)), draft_tokens_dropped=dropped)
    return Group(Problem(name, "q", "a"), stage, prompt, completions, tuple(scores))


def rows_of(groups: Sequence[tuple[str, Group]]) -> list[TrainingRow]:
    return [
        TrainingRow(name, each.stage, each.prompt.token_ids, each_completion, score.reward)
        for name, each in groups
        for each_completion, score in zip(each.completions, each.scores, strict=True)
    ]


def measured(
    drafts: Group, *refined: Group, selection: Selection | None = None, rows: Sequence = ()
) -> dict[str, float]:
    """The metrics of a step with this problem alone."""
    return rollout_metrics([Rollout(drafts.problem, drafts, selection, refined)], list(rows))


def two_problems() -> tuple[list[Rollout], list[TrainingRow]]:
    a_drafts = group(
        "a", Stage.DRAFT, ["ab", "abcd"], [NOTHING, RIGHT], prompt_tokens=6, unfinished=[0]
    )
    a_refined = group(
        "a", Stage.REFINE, ["abcd ", "wxyz"], [RIGHT, WRONG], prompt_tokens=20, dropped=3
    )
    b_drafts = group("b", Stage.DRAFT, ["aaaa", "bb"], [WRONG, NOTHING], prompt_tokens=8)
    b_refined = group(
        "b", Stage.REFINE, ["aabb", "aaaa"], [RIGHT, RIGHT], prompt_tokens=30, unfinished=[1]
    )
    rollouts = [
        Rollout(a_drafts.problem, a_drafts, Selection(1, "best"), (a_refined,)),
        Rollout(b_drafts.problem, b_drafts, Selection(0, "best"), (b_refined,)),
    ]
    return rollouts, rows_of([("a", a_refined), ("b", b_refined)])


def test_every_metric_of_a_two_stage_step():
    rollouts, rows = two_problems()
    assert rollout_metrics(rollouts, rows) == pytest.approx(
        {
            "igrpo/draft_reward": 3 / 4,
            "igrpo/draft_accuracy": 1 / 4,
            "igrpo/draft_format": 2 / 4,
            "igrpo/draft_truncated_rate": 1 / 4,
            "igrpo/draft_tokens": (2 + 5 + 5 + 3) / 4,
            "igrpo/best_draft_reward": (2 + 1) / 2,
            "igrpo/best_draft_accuracy": 1 / 2,
            "igrpo/best_draft_predicted": (1 - 0.5**2 + 0) / 2,
            "igrpo/best_draft_predicted_pooled": 1 - 0.75**2,
            "igrpo/selected_draft_reward": (2 + 1) / 2,
            "igrpo/selected_draft_accuracy": 1 / 2,
            "igrpo/prompt_tokens": 7,
            "igrpo/skipped_rate": 0,
            "igrpo/refinement_reward": 7 / 4,
            "igrpo/refinement_accuracy": 3 / 4,
            "igrpo/refinement_format": 1,
            "igrpo/refinement_truncated_rate": 1 / 4,
            "igrpo/refinement_tokens": (6 + 5 + 5 + 4) / 4,
            "igrpo/refine_prompt_tokens": 25,
            "igrpo/draft_clipped_rate": 1 / 2,
            "igrpo/lift": ((1 / 2 - 1) + (1 - 0)) / 2,
            "igrpo/refinement_better": 2 / 4,
            "igrpo/refinement_worse": 1 / 4,
            "igrpo/mended": 1,
            "igrpo/kept_right": 1 / 2,
            "igrpo/copy_rate": 2 / 4,
            "igrpo/overlap": (8 / 9 + 0 + 4 / 8 + 1) / 4,
            "igrpo/nonzero_advantage_groups": 1 / 2,
            "igrpo/zero_advantage_groups": 1 / 2,
            "igrpo/trained_reward": 7 / 4,
            "reward/reason/match": 4 / 8,
            "reward/reason/mismatch": 2 / 8,
            "reward/reason/no_answer": 2 / 8,
        }
    )


def test_without_feedback_nothing_speaks_of_refinements():
    drafts = group("a", Stage.DRAFT, ["ab", "cd", "ef"], [RIGHT, NOTHING, WRONG])
    got = measured(drafts, rows=rows_of([("a", drafts)]))
    both = rollout_metrics(*two_problems())
    assert set(both) - set(got) == REFINEMENT_ONLY | SELECTED_ONLY
    assert got["igrpo/nonzero_advantage_groups"] == 1
    assert got["igrpo/trained_reward"] == got["igrpo/draft_reward"] == 1
    assert got["igrpo/best_draft_accuracy"] == 1
    assert got["igrpo/best_draft_predicted"] == pytest.approx(1 - (2 / 3) ** 3)


def test_a_skipped_problem_counts_in_stage_1_only():
    rollouts, rows = two_problems()
    skipped = group("c", Stage.DRAFT, ["x", "y"], [NOTHING, NOTHING])
    with_skipped = [*rollouts, Rollout(skipped.problem, skipped, Selection(0, "best", True))]
    plain, got = rollout_metrics(rollouts, rows), rollout_metrics(with_skipped, rows)
    assert got["igrpo/skipped_rate"] == pytest.approx(1 / 3)
    assert got["igrpo/best_draft_accuracy"] == pytest.approx(1 / 3)
    same = REFINEMENT_ONLY | SELECTED_ONLY | {"igrpo/trained_reward"}
    assert {name: got[name] for name in same} == {name: plain[name] for name in same}

    alone = rollout_metrics(with_skipped[-1:], [])
    assert alone["igrpo/skipped_rate"] == 1
    assert not set(alone) & (same | {"igrpo/nonzero_advantage_groups"})


def test_without_a_shown_draft_refinements_are_not_compared_with_one():
    rollouts, rows = two_problems()
    hidden = [
        Rollout(each.problem, each.drafts, Selection(None, "none"), each.refinements)
        for each in rollouts
    ]
    plain, got = rollout_metrics(rollouts, rows), rollout_metrics(hidden, rows)
    assert set(plain) - set(got) == COMPARED | SELECTED_ONLY
    assert all(got[name] == plain[name] for name in got)


def test_several_refinement_groups_of_one_problem():
    drafts = group("a", Stage.DRAFT, ["ab", "cd"], [WRONG, NOTHING])
    first = group("a", Stage.REFINE, ["ab"], [WRONG], prompt_tokens=12, dropped=1)
    second = group("a", Stage.REFINE, ["xy", "zz"], [RIGHT, NOTHING], prompt_tokens=14)
    rows = rows_of([("a/0", first), ("a/1", second)])
    got = measured(drafts, first, second, selection=Selection(0, "best"), rows=rows)
    assert got["igrpo/refinement_accuracy"] == pytest.approx(1 / 3)
    assert got["igrpo/lift"] == pytest.approx(1 / 3)
    assert got["igrpo/refinement_better"] == got["igrpo/refinement_worse"] == pytest.approx(1 / 3)
    assert got["igrpo/copy_rate"] == pytest.approx(1 / 3)
    assert got["igrpo/draft_clipped_rate"] == 1 / 2
    assert got["igrpo/refine_prompt_tokens"] == 13
    assert got["igrpo/nonzero_advantage_groups"] == 1 / 2


def test_each_refinement_is_compared_with_the_draft_that_its_prompt_showed():
    drafts = group("a", Stage.DRAFT, ["ab", "cd", "ef"], [RIGHT, NOTHING, WRONG])
    refined = [
        group("a", Stage.REFINE, [text], [score])
        for text, score in (("ab", RIGHT), ("cx", RIGHT), ("ef", WRONG))
    ]
    got = measured(drafts, *refined, selection=Selection(None, "each", each=(0, 1, 2)))
    assert got["igrpo/mended"] == 1 / 2 and got["igrpo/kept_right"] == 1
    assert got["igrpo/lift"] == pytest.approx(1 / 3)
    assert got["igrpo/copy_rate"] == pytest.approx(2 / 3)
    assert got["igrpo/refinement_better"] == pytest.approx(1 / 3)
    assert "igrpo/selected_draft_reward" not in got


def test_verdicts_are_counted_apart_from_refinements():
    drafts = group("a", Stage.DRAFT, ["ab", "cd"], [RIGHT, NOTHING])
    said = [("yes", 1.0, True), ("no", 0.0, False), ("no", 0.0, False), ("what", 0.0, False)]
    reasons = {word: f"said_{word}" for word in ("yes", "no")}
    scores = [
        Score(reward, {"accuracy": float(right)}, reasons.get(word, "no_verdict"))
        for word, reward, right in said
    ]
    verdicts = group("a", Stage.REFINE, [word for word, *_ in said], scores)
    verdicts = replace(verdicts, target=Target("yes", ("yes", "no"), 1.0))
    got = measured(drafts, verdicts, selection=Selection(0, "right"))
    assert got["igrpo/verdict_accuracy"] == got["igrpo/verdict_yes"] == 1 / 4
    assert got["igrpo/verdict_yes_expected"] == 1 and got["igrpo/verdict_reward"] == 1 / 4
    assert got["igrpo/selected_draft_accuracy"] == 1 and got["reward/reason/said_no"] == 1 / 3
    assert not {name for name in REFINEMENT_ONLY - {"igrpo/draft_clipped_rate"} if name in got}


def test_selected_and_best_draft_differ_where_the_rule_does():
    drafts = group("a", Stage.DRAFT, ["ab", "cd"], [RIGHT, NOTHING])
    refined = group("a", Stage.REFINE, ["ab", "cd"], [RIGHT, NOTHING])
    got = measured(drafts, refined, selection=Selection(1, "worst"))
    assert got["igrpo/best_draft_accuracy"] == 1 and got["igrpo/selected_draft_accuracy"] == 0
    assert got["igrpo/lift"] == 1 / 2


def test_a_correct_but_unformatted_draft_makes_the_best_draft_correct():
    """Accuracy + format ties it with a wrong, formatted one; Proposition 3.1 is about accuracy."""
    drafts = group("a", Stage.DRAFT, ["ab", "cd"], [WRONG, UNFORMATTED])
    got = measured(drafts, selection=Selection(0, "best"))
    assert got["igrpo/best_draft_reward"] == got["igrpo/best_draft_accuracy"] == 1
    assert got["igrpo/selected_draft_accuracy"] == 0


def test_a_reward_without_parts_has_no_format_metric():
    drafts = group("a", Stage.DRAFT, ["ab", "cd"], [Score(1.0), Score(0.3)])
    got = measured(drafts)
    assert got["igrpo/draft_accuracy"] == 1 / 2
    assert not {name for name in got if name.startswith("reward/") or name.endswith("_format")}
    assert rollout_metrics([], []) == {}, "a step without problems has none"


@pytest.mark.parametrize(("first", "second", "wanted"), CASES["overlap_counts_tokens"])
def test_overlap_counts_tokens(first, second, wanted):
    for shown, answer in ((first, second), (second, first)):
        drafts = group("a", Stage.DRAFT, [shown], [RIGHT])
        refined = group("a", Stage.REFINE, [answer], [RIGHT])
        got = measured(drafts, refined, selection=Selection(0, "best"))
        assert got["igrpo/overlap"] == pytest.approx(wanted)


def test_pass_at_k_equals_the_enumeration_of_all_subsets():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations(range(n), k))
            passed = sum(any(index < c for index in subset) for subset in subsets)
            assert pass_at_k(n, c, k) == pytest.approx(passed / len(subsets), abs=1e-14)


def test_pass_at_k_keeps_its_digits_at_large_n():
    for n, c, k in [(100_000, 1, 1), (100_000, 3, 7), (5_000, 2_500, 40), (4_096, 1, 4_096)]:
        exact = (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)
        assert pass_at_k(n, c, k) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5), (0, 0, 1)])
def test_pass_at_k_rejects_what_it_cannot_estimate(n, c, k):
    with pytest.raises(ValueError, match="pass_at_k needs"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(("p", "n"), [(0.05, 4), (0.3, 4), (0.5, 2), (0.2, 8)])
def test_proposition_31_predicts_simulated_best_drafts(p, n):
    generator = random.Random(f"{p} {n}")
    trials = 20_000
    best = [float(max(generator.random() < p for _ in range(n))) for _ in range(trials)]
    mean, stderr = mean_and_stderr(best)
    assert abs(mean - best_draft_prediction(p, n)) < 4 * stderr
    assert 4 * stderr < 0.02


def test_measured_best_drafts_lie_between_the_two_predictions():
    """Through the metrics themselves, on problems of very different difficulty."""
    generator = random.Random(0)
    drafts = []
    for name in range(2_000):
        p = generator.choice([0.02, 0.3, 0.9])
        scores = [RIGHT if generator.random() < p else NOTHING for _ in range(4)]
        drafts.append(group(str(name), Stage.DRAFT, ["a"] * 4, scores))
    got = rollout_metrics([Rollout(each.problem, each) for each in drafts], [])
    exact = statistics.fmean(1 - (1 - p) ** 4 for p in (0.02, 0.3, 0.9))
    assert got["igrpo/best_draft_accuracy"] == pytest.approx(exact, abs=0.04)
    assert got["igrpo/best_draft_predicted"] < got["igrpo/best_draft_accuracy"] - 0.02
    assert got["igrpo/best_draft_accuracy"] < got["igrpo/best_draft_predicted_pooled"] - 0.1


def test_best_draft_prediction_at_its_ends():
    assert best_draft_prediction(0.0, 4) == 0.0
    assert best_draft_prediction(1.0, 4) == 1.0
    assert best_draft_prediction(1e-18, 4) == pytest.approx(4e-18, rel=1e-12)
    assert best_draft_prediction(0.37, 1) == pytest.approx(0.37)


def test_mean_and_standard_error():
    mean, stderr = mean_and_stderr([0.0, 1.0, 1.0, 0.5])
    assert mean == 0.625
    assert stderr == pytest.approx(statistics.stdev([0, 1, 1, 0.5]) / 2)
    assert mean_and_stderr([0.3]) == (0.3, 0.0)


def drafted(*scores: Score) -> Rollout:
    drafts = group("p", Stage.DRAFT, ["a"] * len(scores), scores)
    return Rollout(drafts.problem, drafts, Selection(0, "best"))


def test_prefetched_drafts_are_told_apart_by_age():
    rollouts = [drafted(WRONG, RIGHT), drafted(NOTHING, WRONG), drafted(NOTHING, RIGHT)]
    assert prefetch_metrics(rollouts, [1, None, 0], dropped=3) == {
        "igrpo/draft_staleness": 1 / 3,
        "igrpo/drafts_prefetched": 2 / 3,
        "igrpo/drafts_dropped": 3.0,
        "igrpo/best_draft_reward_stale_0": 1.5,
        "igrpo/best_draft_reward_stale_1": 2.0,
    }
    unselected = Rollout(rollouts[0].problem, rollouts[0].drafts)
    assert set(prefetch_metrics([unselected], [0], 0)) == {
        "igrpo/draft_staleness",
        "igrpo/drafts_prefetched",
        "igrpo/drafts_dropped",
    }

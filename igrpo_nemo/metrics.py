"""What a two-stage step did, as named numbers; pass@k and Proposition 3.1.

    rollouts, training rows --> igrpo/* and reward/reason/*      (names: docs of each function)
    correct count           --> pass@k of one problem

Plain Python, no torch. A metric without anything to average is absent, never 0 or nan: with
feedback `none`, for example, nothing that speaks of refinements appears.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from igrpo_nemo.objectives.reward_shaping import nonzero_groups
from igrpo_nemo.types import Completion, Group, Rollout, Score, StopReason, TrainingRow


def rollout_metrics(rollouts: Sequence[Rollout], rows: Sequence[TrainingRow]) -> dict[str, float]:
    """All `igrpo/*` and `reward/*` metrics of one step.

    Rates are fractions in [0, 1]; token counts are means. `nonzero_advantage_groups`: the fraction
    of trained groups whose rewards differ; the others, `zero_advantage_groups`, have a zero
    gradient.
    """
    differs = nonzero_groups([row.reward for row in rows], [row.group for row in rows]).values()
    metrics = {
        **_draft_metrics(rollouts),
        **_refinement_metrics(rollouts),
        **_comparison_metrics(rollouts),
        "igrpo/nonzero_advantage_groups": _mean(differs),
        "igrpo/zero_advantage_groups": _mean(not each for each in differs),
        "igrpo/trained_reward": _mean(row.reward for row in rows),
        **_score_metrics(rollouts),
        **_set_metrics(rollouts),
    }
    return {name: value for name, value in metrics.items() if value is not None}


def _set_metrics(rollouts: Sequence[Rollout]) -> dict[str, float | None]:
    """Of a mixture: each set's share of the problems, and the accuracy of their drafts."""
    groups: dict[str, list[Group]] = {}
    for rollout in rollouts:
        name = rollout.problem.id.rpartition("/")[0] or "generated"
        groups.setdefault(name, []).append(rollout.drafts)
    if len(groups) < 2:
        return {}
    shares = {f"data/share/{name}": len(own) / len(rollouts) for name, own in groups.items()}
    return shares | {
        f"data/draft_accuracy/{name}": _mean(_accuracy(g.scores) for g in own if g.scores)
        for name, own in groups.items()
    }


def prefetch_metrics(
    rollouts: Sequence[Rollout], ages: Sequence[int | None], dropped: int
) -> dict[str, float]:
    """Where the drafts of a step came from, with `igrpo.draft_prefetch`.

    `ages` are the updates between each problem's drafts and its refinements, None where the drafts
    were not sampled ahead. `draft_staleness` is their mean (None is 0), `drafts_prefetched` the
    fraction that was sampled ahead, `drafts_dropped` the problems whose drafts fitted no batch.
    `best_draft_reward_stale_<age>` is the mean of the best draft's reward over those of that age.
    """
    staleness = [age or 0 for age in ages]
    metrics = {
        "igrpo/draft_staleness": _mean(staleness),
        "igrpo/drafts_prefetched": _mean(age is not None for age in ages),
        "igrpo/drafts_dropped": float(dropped),
    }
    for value in sorted(set(staleness)):
        metrics[f"igrpo/best_draft_reward_stale_{value}"] = _mean(
            max(rollout.drafts.rewards)
            for rollout, age in zip(rollouts, staleness, strict=True)
            if age == value and rollout.selection is not None
        )
    return {name: value for name, value in metrics.items() if value is not None}


def _draft_metrics(rollouts: Sequence[Rollout]) -> dict[str, float | None]:
    """Stage 1. `best_draft_*` are means over problems of the maximum over the problem's drafts.

    best_draft_accuracy (some draft is correct) is what Proposition 3.1 predicts from the drafts'
    accuracy p_q: `best_draft_predicted` is the mean over problems of 1 - (1 - p_q)^N,
    `best_draft_predicted_pooled` has one p, the mean over problems, in the place of every p_q.
    The draft that was shown is in `selected_draft_reward` and `selected_draft_accuracy`: it is
    another one than the best where the selection rule is random or worst, or where a wrong but
    well formatted draft ties with a right one.
    """
    groups = [rollout.drafts for rollout in rollouts if rollout.drafts.scores]
    accuracy_P = [_accuracy(group.scores) for group in groups]
    pooled = _mean(accuracy_P)
    selected = [score for rollout in rollouts if (score := _selected_score(rollout)) is not None]
    return {
        **_stage_metrics("draft", groups),
        "igrpo/best_draft_reward": _mean(max(group.rewards) for group in groups),
        "igrpo/best_draft_accuracy": _mean(
            any(score.correct for score in group.scores) for group in groups
        ),
        "igrpo/best_draft_predicted": _mean(
            best_draft_prediction(accuracy, len(group.scores))
            for accuracy, group in zip(accuracy_P, groups, strict=True)
        ),
        "igrpo/best_draft_predicted_pooled": _mean(
            best_draft_prediction(pooled or 0.0, len(group.scores)) for group in groups
        ),
        "igrpo/selected_draft_reward": _mean(score.reward for score in selected),
        "igrpo/selected_draft_accuracy": _mean(score.correct for score in selected),
        "igrpo/prompt_tokens": _mean(len(group.prompt.token_ids) for group in groups),
        "igrpo/skipped_rate": _mean(
            rollout.selection is not None and rollout.selection.skipped for rollout in rollouts
        ),
    }


def _refinement_metrics(rollouts: Sequence[Rollout]) -> dict[str, float | None]:
    """Stage 2. `draft_clipped_rate`: over Stage 2 prompts that show a draft, the fraction in which
    the draft was shortened to fit.

    Completions that answer with a word of their own are counted apart. `verdict_accuracy`: the
    right word. `verdict_yes`: the word yes, right or not; beside it `verdict_yes_expected`, the
    share of the prompts' completions for which that was right.
    """
    groups = [group for rollout in rollouts for group in rollout.refinements]
    answers = [group for group in groups if group.scores and group.target is None]
    verdicts = [(g.target, score) for g in groups if g.target is not None for score in g.scores]
    showing = [
        group.prompt
        for rollout in rollouts
        if rollout.selection is not None and rollout.selection.shown
        for group in rollout.refinements
    ]
    return {
        **_stage_metrics("refinement", answers),
        "igrpo/refine_prompt_tokens": _mean(len(group.prompt.token_ids) for group in answers),
        "igrpo/draft_clipped_rate": _mean(prompt.draft_tokens_dropped > 0 for prompt in showing),
        "igrpo/verdict_reward": _mean(score.reward for _, score in verdicts),
        "igrpo/verdict_accuracy": _mean(score.correct for _, score in verdicts),
        "igrpo/verdict_yes": _mean(score.reason == "said_yes" for _, score in verdicts),
        "igrpo/verdict_yes_expected": _mean(target.word == "yes" for target, _ in verdicts),
    }


def _stage_metrics(stage: str, groups: Sequence[Group]) -> dict[str, float | None]:
    """Means over all completions of the stage; `format` only where the reward has that part."""
    scores = [score for group in groups for score in group.scores]
    completions = [completion for group in groups for completion in group.completions]
    formats = [score.components["format"] for score in scores if "format" in score.components]
    return {
        f"igrpo/{stage}_reward": _mean(score.reward for score in scores),
        f"igrpo/{stage}_accuracy": _accuracy(scores) if scores else None,
        f"igrpo/{stage}_format": _mean(formats),
        f"igrpo/{stage}_truncated_rate": _mean(each.truncated for each in completions),
        f"igrpo/{stage}_tokens": _mean(len(each.token_ids) for each in completions),
    }


def _comparison_metrics(rollouts: Sequence[Rollout]) -> dict[str, float | None]:
    """Every refinement against the draft that its prompt showed, where it showed one.

    `lift` is the mean over problems of (refinement accuracy - accuracy of the drafts shown);
    `refinement_better` and `refinement_worse` compare rewards; `mended` is the share of right
    refinements of wrong drafts, `kept_right` that of right drafts; `copy_rate` counts texts equal
    to the whole draft but for surrounding white space; `overlap` is the Dice coefficient of their
    tokens.
    """
    lifts: list[float] = []
    pairs: list[tuple[Score, Score]] = []
    texts: list[tuple[Completion, Completion]] = []
    for compared in map(_with_their_drafts, rollouts):
        if compared:
            scores = [(shown, score) for _, shown, _, score in compared]
            before, after = zip(*scores, strict=True)
            lifts.append(_accuracy(after) - _accuracy(before))
            pairs += scores
            texts += [(draft, completion) for draft, _, completion, _ in compared]
    return {
        "igrpo/lift": _mean(lifts),
        "igrpo/refinement_better": _mean(score.reward > shown.reward for shown, score in pairs),
        "igrpo/refinement_worse": _mean(score.reward < shown.reward for shown, score in pairs),
        "igrpo/mended": _mean(score.correct for shown, score in pairs if not shown.correct),
        "igrpo/kept_right": _mean(score.correct for shown, score in pairs if shown.correct),
        "igrpo/copy_rate": _mean(a.text.strip() == b.text.strip() for a, b in texts),
        "igrpo/overlap": _mean(_dice(_bag(a), _bag(b)) for a, b in texts),
    }


def _score_metrics(rollouts: Sequence[Rollout]) -> dict[str, float | None]:
    """`reward/reason/<reason>`, fractions of all completions, of both stages; `reward/<component>`
    of functions of the user's own, their parts and their failures: the mean over those that have
    it."""
    scores = [
        score
        for rollout in rollouts
        for group in (rollout.drafts, *rollout.refinements)
        for score in group.scores
    ]
    reasons = Counter(score.reason for score in scores)
    parts = [score.components for score in scores]
    names = {name for each in parts for name in each} - {"accuracy", "format", "judge"}
    return {
        **{f"reward/reason/{r}": reasons[r] / len(scores) for r in sorted(reasons) if r},
        **{
            f"reward/{name}": _mean(each[name] for each in parts if name in each)
            for name in sorted(names)
        },
    }


def _bag(completion: Completion) -> Counter[int]:
    """How often each token occurs; the end-of-sequence token does not count."""
    ends = completion.stop_reason is StopReason.EOS
    return Counter(completion.token_ids[:-1] if ends else completion.token_ids)


def _dice(first: Counter[int], second: Counter[int]) -> float:
    """Token-multiset overlap: 2 |A and B| / (|A| + |B|), in [0, 1]; two empty ones overlap by 1.

    Order does not matter, so that this is an upper bound on what was taken over, at a cost linear
    in the lengths.
    """
    total = first.total() + second.total()
    if total == 0:
        return 1.0
    common = sum(min(count, second[token]) for token, count in first.items())
    return 2 * common / total


def best_draft_prediction(p: float, n: int) -> float:
    """Proposition 3.1: E[reward of the best of n drafts] = 1 - (1 - p)^n for binary rewards.

    The function is concave in p, so that on average over problems the measured success lies above
    the mean of the predictions from each problem's own estimate of p (made from the same n
    drafts), and below the prediction from the pooled p.
    """
    return 1.0 if p == 1 else -math.expm1(n * math.log1p(-p))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of pass@k from n samples, c of them correct (arXiv 2107.03374, Eq. 1).

    1 - C(n - c, k) / C(n, k), as the product 1 - prod_{i = n-c+1}^{n} (1 - k / i): no binomial
    overflows, and summing logarithms keeps the digits of small results.

    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    return -math.expm1(math.fsum(math.log1p(-k / i) for i in range(n - c + 1, n + 1)))


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, sample std / sqrt(n).

    For accuracies, the values are per-problem means: samples of one problem are not independent.
    One value has no spread to measure: its standard error is given as 0.
    """
    size = len(values)
    mean = math.fsum(values) / size
    if size == 1:
        return mean, 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (size - 1)
    return mean, math.sqrt(variance / size)


def _mean(values: Iterable[float]) -> float | None:
    listed = [float(value) for value in values]
    return math.fsum(listed) / len(listed) if listed else None


def _accuracy(scores: Sequence[Score]) -> float:
    return sum(score.correct for score in scores) / len(scores)


def _selected_score(rollout: Rollout) -> Score | None:
    """The score of the draft that Stage 2 was shown, if it was shown one."""
    selection = rollout.selection
    if selection is None or selection.index is None or selection.skipped:
        return None
    return rollout.drafts.scores[selection.index]


def _with_their_drafts(rollout: Rollout) -> list[tuple[Completion, Score, Completion, Score]]:
    """Each refinement behind the draft that its prompt showed; one draft may serve all prompts."""
    shown, drafts = rollout.selection.shown if rollout.selection else (), rollout.drafts
    if len(shown) == 1:
        shown *= len(rollout.refinements)
    return [
        (drafts.completions[index], drafts.scores[index], completion, score)
        for index, group in zip(shown, rollout.refinements, strict=False)
        if group.target is None
        for completion, score in zip(group.completions, group.scores, strict=True)
    ]

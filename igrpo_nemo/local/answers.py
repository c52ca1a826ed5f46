"""Scored answers to the bare prompt q, as at inference: what validation and evaluation ask for.

    (problem, seed key) -> q -> sampler -> scorer -> Group
    held-out problems -> answers -> val/* metrics

Beside these, when asked for, the accuracy under q' and the gap between the two: a policy that only
learnt to copy or mend a draft shows there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from igrpo_nemo.environment import Attempt, scored
from igrpo_nemo.local.parts import RunParts
from igrpo_nemo.local.rollout import TwoStageRollout
from igrpo_nemo.local.sampler import Sampler, SampleRequest, SamplingParams
from igrpo_nemo.metrics import mean_and_stderr
from igrpo_nemo.prompts import PromptBuilder
from igrpo_nemo.rewards import Scorer
from igrpo_nemo.types import Group, Problem, Stage

Progress = Callable[[int, int], None]
"""Called with (completions finished, completions in all)."""


@dataclass(frozen=True, slots=True)
class Answerer:
    """Asks a policy bare questions and scores what it answers."""

    sampler: Sampler
    prompts: PromptBuilder
    scorer: Scorer
    params: SamplingParams

    def __call__(
        self,
        keyed: Sequence[tuple[Problem, str]],
        num_samples: int = 1,
        on_progress: Progress = lambda done, total: None,
    ) -> list[Group]:
        """A group of answers per (problem, seed key), in order. The draws depend on the key alone.

        Raises `UserError` for a problem whose q does not fit.
        """
        prompts = [self.prompts.question(problem) for problem, _ in keyed]
        requests = [
            SampleRequest(prompt.token_ids, num_samples, key)
            for prompt, (_, key) in zip(prompts, keyed, strict=True)
        ]
        completions = self.sampler.sample(requests, self.params, on_progress=on_progress)
        attempts = [
            Attempt(problem, prompt, tuple(rows))
            for (problem, _), prompt, rows in zip(keyed, prompts, completions, strict=True)
        ]
        return scored(self.scorer, Stage.DRAFT, attempts)


def validate(
    parts: RunParts, rollout: TwoStageRollout, between_batches: Callable[[], None]
) -> tuple[dict[str, float], list[Group]]:
    """`val/*` metrics of the current policy on the held-out problems, and its answers, of which
    `igrpo.validation` says how many a problem are sampled, and how.

    The draws depend on the seed and the problem but not on the step, so that two validations
    differ by the policy alone. `between_batches` is called before every batch and may raise.
    """
    config, problems, environment = parts.config, parts.validation, parts.environment
    keys = config.igrpo.validation
    params = replace(rollout.params, temperature=keys.temperature, top_p=keys.top_p)
    answerer = Answerer(parts.sampler, environment.prompts, environment.scorer, params)
    size = config.grpo.val_batch_size or len(problems)
    groups: list[Group] = []
    for start in range(0, len(problems), size):
        between_batches()
        batch = problems[start : start + size]
        keyed = [(p, f"{config.grpo.seed}/validation/{p.id}") for p in batch]
        groups += answerer(keyed, keys.samples)
    metrics = _bare_metrics(groups)
    if config.igrpo.val_draft_conditioned:
        between_batches()
        refined = [group for each in rollout(problems, step=0) for group in each.refinements]
        correct = [score.correct for group in refined for score in group.scores]
        if correct:  # none where the feedback has no Stage 2
            metrics["val/draft_conditioned_accuracy"] = sum(correct) / len(correct)
            metrics["val/transfer_gap"] = sum(correct) / len(correct) - metrics["val/accuracy"]
    return metrics, groups


def _bare_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Means over all answers; of k > 1 a problem also `pass_at_k`, unbiased by construction, and
    `avg_at_k`, which is `val/accuracy` under the name that says k."""
    scores = [score for group in groups for score in group.scores]
    completions = [completion for group in groups for completion in group.completions]
    accuracy, stderr = mean_and_stderr([group.share_right for group in groups])
    metrics = {
        "val/accuracy": accuracy,
        "val/accuracy_stderr": stderr,
        "val/reward": sum(score.reward for score in scores) / len(scores),
        "val/tokens": sum(len(c.token_ids) for c in completions) / len(completions),
        "val/truncated_rate": sum(c.truncated for c in completions) / len(completions),
    }
    if (k := len(groups[0].scores)) > 1:
        metrics[f"val/avg_at_{k}"] = accuracy
        metrics[f"val/pass_at_{k}"] = sum(g.share_right > 0 for g in groups) / len(groups)
    if "format" in scores[0].components:
        metrics["val/format"] = sum(s.components["format"] for s in scores) / len(scores)
    return metrics

"""Validation: single shot on the bare prompt, as at inference (paper section 3.2.1).

Beside it, when asked for, the accuracy under q' and the gap between the two: a policy that only
learnt to copy or mend a draft shows there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from igrpo_nemo.config import Config
from igrpo_nemo.local.answers import single_shot
from igrpo_nemo.local.parts import Parts
from igrpo_nemo.metrics import mean_and_stderr
from igrpo_nemo.types import Group, Problem


def validate(
    config: Config, parts: Parts, between_batches: Callable[[], None]
) -> tuple[dict[str, float], list[Group]]:
    """`val/*` metrics of the current policy on the held-out problems, and its answers.

    The draws depend on the seed and the problem but not on the step, so that two validations
    differ by the policy alone. `between_batches` is called before every batch and may raise.
    """
    params = replace(
        parts.rollout.params,
        temperature=config.igrpo.val_temperature,
        top_p=config.igrpo.val_top_p,
    )
    size = config.grpo.val_batch_size or len(parts.validation)
    groups: list[Group] = []
    for start in range(0, len(parts.validation), size):
        between_batches()
        groups += single_shot(
            parts.validation[start : start + size],
            parts.sampler,
            parts.environment.prompts,
            parts.environment.scorer,
            params,
            f"{config.grpo.seed}/validation",
        )
    metrics = _bare_metrics(groups)
    if config.igrpo.val_draft_conditioned:
        between_batches()
        conditioned = _draft_conditioned_accuracy(parts, parts.validation)
        if conditioned is not None:
            metrics["val/draft_conditioned_accuracy"] = conditioned
            metrics["val/transfer_gap"] = conditioned - metrics["val/accuracy"]
    return metrics, groups


def _bare_metrics(groups: Sequence[Group]) -> dict[str, float]:
    scores = [score for group in groups for score in group.scores]
    completions = [completion for group in groups for completion in group.completions]
    accuracy, stderr = mean_and_stderr([float(score.correct) for score in scores])
    metrics = {
        "val/accuracy": accuracy,
        "val/accuracy_stderr": stderr,
        "val/reward": sum(score.reward for score in scores) / len(scores),
        "val/tokens": sum(len(c.token_ids) for c in completions) / len(completions),
        "val/truncated_rate": sum(c.truncated for c in completions) / len(completions),
    }
    if "format" in scores[0].components:
        metrics["val/format"] = sum(s.components["format"] for s in scores) / len(scores)
    return metrics


def _draft_conditioned_accuracy(parts: Parts, problems: Sequence[Problem]) -> float | None:
    """Accuracy of refinements, sampled as in training; None where the feedback has no Stage 2."""
    rollouts = parts.rollout(problems, step=0)
    scores = [
        score for rollout in rollouts for group in rollout.refinements for score in group.scores
    ]
    if not scores:
        return None
    return sum(score.correct for score in scores) / len(scores)

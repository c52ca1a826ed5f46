"""Feedback `none`: NeMo-RL's own rollout, described by the metrics of the embedded engine.

    run_multi_turn_rollout (as it is) ─ its batch ─> groups of completions ─> igrpo/* metrics

Nothing that NeMo-RL trains on is touched. Its asynchronous rollout keeps a row whose generation
failed, without an answer and with reward 0: that fails the step, as it does with two stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_rl.distributed.batched_data_dict import BatchedDataDict

from igrpo_nemo.metrics import rollout_metrics
from igrpo_nemo.nemo.batches import completion_of
from igrpo_nemo.nemo.errors import RolloutError, RowError
from igrpo_nemo.nemo.spec import SingleStageMap
from igrpo_nemo.types import Completion, Group, Problem, Prompt, Rollout, Score, Stage


def described(
    batch: BatchedDataDict, metrics: dict[str, Any], task_to_env: SingleStageMap
) -> tuple[BatchedDataDict, dict[str, Any]]:
    """What NeMo-RL's rollout returned, with the project's metrics beside its own.

    Raises `RolloutError` naming the problem where a row has no answer.
    """
    spec = task_to_env.spec
    rows_per_problem = spec.feedback.num_trained
    rollouts = [
        _rollout(batch, range(start, start + rows_per_problem), spec.weights)
        for start in range(0, len(batch["message_log"]), rows_per_problem)
        if float(batch["loss_multiplier"][start]) > 0
    ]
    rows = [row for rollout in rollouts for row in spec.feedback.training_rows(rollout)]
    lengths = [len(c.token_ids) for rollout in rollouts for c in rollout.drafts.completions]
    ours = {
        **rollout_metrics(rollouts, rows),
        "igrpo/generated_tokens": float(sum(lengths)),
        "igrpo/completions": float(len(lengths)),
    }
    return batch, {**metrics, **ours, **task_to_env.rolled_out(rollouts)}


def _rollout(batch: BatchedDataDict, rows: range, weights: Mapping[str, float]) -> Rollout:
    info = batch["extra_env_info"][rows[0]]
    problem = Problem(**info["problem"])
    question = batch["message_log"][rows[0]][0]
    prompt = Prompt(
        text=str(question["content"]),
        token_ids=tuple(question["token_ids"].tolist()),
        thinking_open=info["thinking_open"],
    )
    with RolloutError.at(problem, Stage.DRAFT):
        completions = tuple(_completion(batch, row) for row in rows)
    scores = tuple(_score(batch, row, weights) for row in rows)
    return Rollout(problem, Group(problem, Stage.DRAFT, prompt, completions, scores))


def _completion(batch: BatchedDataDict, row: int) -> Completion:
    answers = [m for m in batch["message_log"][row] if m["role"] == "assistant"]
    if not answers:
        raise RowError(row, "the engine returned no answer")
    return completion_of(answers[0], truncated=bool(batch["truncated"][row]))


def _score(batch: BatchedDataDict, row: int, weights: Mapping[str, float]) -> Score:
    """The components again, from NeMo-RL's weighted ones in fp32."""
    if len(weights) == 1:
        columns = [batch["total_reward"]]
    else:
        columns = [batch[f"reward{number}"] for number in range(1, len(weights) + 1)]
    components = {
        name: round(float(column[row]) / weight, 6)
        for (name, weight), column in zip(weights.items(), columns, strict=True)
    }
    return Score(float(batch["total_reward"][row]), components)

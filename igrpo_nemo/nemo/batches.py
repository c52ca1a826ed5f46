"""NeMo-RL's batches to plain data and back.

    repeated batch (P x rows) -> items -> [rollout] -> training rows -> batch of P x rows
    assistant message of NeMo-RL <-> MessageCompletion

The batch that goes back holds, per trained row, a fresh conversation: the context as one user
message without `generation_logprobs` (so nothing of it is trained) and the completion with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from nemo_rl.distributed.batched_data_dict import BatchedDataDict

from igrpo_nemo.feedback import Feedback
from igrpo_nemo.feedback.protocol import group_name, rows_of_group
from igrpo_nemo.nemo.failure import RolloutError
from igrpo_nemo.nemo.loss import SHAPED
from igrpo_nemo.nemo.prefetch import BATCH_NUMBER
from igrpo_nemo.nemo.stages import Item
from igrpo_nemo.nemo.versions import component_key
from igrpo_nemo.types import (
    Completion,
    Problem,
    Prompt,
    Rollout,
    Score,
    Stage,
    StopReason,
    TrainingRow,
)


@dataclass(frozen=True, slots=True)
class MessageCompletion(Completion):
    """A completion together with NeMo-RL's assistant message for it.

    The message has `content`, `token_ids` and `generation_logprobs` as tensors, and whatever else
    the backend attaches (routed experts); `logprobs` of this object stay empty.
    """

    message: Mapping[str, Any] = field(default_factory=dict, compare=False)


def completion_of(log: Sequence[Mapping[str, Any]], *, truncated: bool) -> MessageCompletion:
    """The completion in a log's first assistant message. Raises `RuntimeError` without one."""
    message = next((each for each in log if each["role"] == "assistant"), None)
    if message is None:
        raise RuntimeError("the engine returned no answer")
    return MessageCompletion(
        text=message["content"],
        token_ids=tuple(message["token_ids"].tolist()),
        logprobs=(),
        stop_reason=StopReason.LENGTH if truncated else StopReason.EOS,
        message=message,
    )


def user_message(prompt: Prompt) -> dict[str, Any]:
    """A prompt as NeMo-RL's user message."""
    token_ids = torch.tensor(prompt.token_ids, dtype=torch.int64)
    return {"role": "user", "content": prompt.text, "token_ids": token_ids}


def items_of(batch: BatchedDataDict, rows_per_problem: int) -> list[Item]:
    """The problems of a batch whose rows were repeated `rows_per_problem` times, in order.

    Raises `RolloutError` where rows of one problem are not neighbours: then a group would be made
    of completions of different problems.
    """
    infos, size, items = batch["extra_env_info"], len(batch["message_log"]), []
    for start in range(0, size, rows_per_problem):
        rows = range(start, start + rows_per_problem)
        whole = rows[-1] < size
        names = {(int(batch["idx"][row]), infos[row]["problem"]["id"]) for row in rows if whole}
        if len(names) != 1:
            raise RolloutError(
                f"rows {start} to {rows[-1]} of the batch do not belong to one problem"
            )
        question = batch["message_log"][start][0]
        prompt = Prompt(
            text=str(question["content"]),
            token_ids=tuple(question["token_ids"].tolist()),
            thinking_open=infos[start]["thinking_open"],
        )
        overlong = float(batch["loss_multiplier"][start]) == 0.0
        problem = Problem(**infos[start]["problem"])
        items.append(Item(problem, prompt, start // rows_per_problem, overlong))
    return items


def equally_many(rollout: Rollout, feedback: Feedback, overlong: bool = False) -> list[TrainingRow]:
    """`num_trained` rows of a problem, as NeMo-RL wants of every one: what `feedback` trains, and
    where that is less (a problem skipped, `overlong` and cut by NeMo-RL, or without a part of its
    Stage 2) rows of weight 0. Their context is not used by others, so that no group's baseline or
    spread moves; their reward is the mean of the problem's, so that NeMo-RL's mean reward does not
    move either.
    """
    rows = [] if overlong else feedback.training_rows(rollout)
    missing = feedback.num_trained - len(rows)
    if not missing:
        return rows
    name = group_name(rollout.problem.id, Stage.DRAFT)
    [first, *_] = rows_of_group(rollout.drafts, name)
    if not rows:
        return [replace(first, weight=0.0)] * missing
    mean = sum(row.reward for row in rows) / len(rows)
    alone = replace(first, context_ids=first.context_ids[:1], reward=mean, weight=0.0)
    return [*rows, *[alone] * missing]


def trained_batch(
    batch: BatchedDataDict,
    problems: Sequence[tuple[Rollout, Sequence[TrainingRow]]],
    weights: Mapping[str, float],
) -> BatchedDataDict:
    """The batch that NeMo-RL trains on: a training row in the place of each of its rows.

    A row's weight is its `loss_multiplier`, whose sum NeMo-RL divides the loss by. With several
    reward components (`weights` by name) their weighted values are added as NeMo-RL names them.
    Raises `RolloutError` where a row is missing, and where a group's rows stand
    under several contexts.
    """
    flat = [(row, rollout) for rollout, rows in problems for row in rows]
    rows = [row for row, _ in flat]
    _one_context_a_group(rows)
    if len(rows) != len(batch["message_log"]):
        raise RolloutError(f"{len(rows)} training rows in the place of {len(batch['message_log'])}")
    shares = torch.tensor([row.weight for row in rows])
    trained: BatchedDataDict = BatchedDataDict(
        {key: value for key, value in batch.items() if key != BATCH_NUMBER}
    )
    trained["message_log"] = [_message_log(row, rollout) for row, rollout in flat]
    trained["length"] = torch.tensor([len(row.context_ids) for row in rows])
    trained["total_reward"] = torch.tensor([row.reward for row in rows], dtype=torch.float32)
    trained["truncated"] = torch.tensor([row.completion.truncated for row in rows])
    trained["loss_multiplier"] = batch["loss_multiplier"] * shares
    if len(weights) > 1:
        scores = [_score(row, rollout) for row, rollout in flat]
        for number, (name, weight) in enumerate(weights.items(), start=1):
            values = [weight * score.components.get(name, 0.0) for score in scores]
            trained[component_key(number, name)] = torch.tensor(values, dtype=torch.float32)
    return trained


def _one_context_a_group(rows: Sequence[TrainingRow]) -> None:
    """NeMo-RL takes the rows of one prompt for a group: a group of several prompts would fall into
    groups of one, whose advantage is 0, and nothing would be learned."""
    contexts: dict[str, tuple[int, ...]] = {}
    for row in rows:
        if row.weight and contexts.setdefault(row.group, row.context_ids) != row.context_ids:
            raise RolloutError(
                f"the feedback trains group {row.group} under several contexts, which NeMo-RL "
                "cannot: train its rows under one, make a group of each, or use engine=local"
            )


def _score(row: TrainingRow, rollout: Rollout) -> Score:
    groups = (rollout.drafts, *rollout.refinements)
    pairs = (pair for each in groups for pair in zip(each.completions, each.scores, strict=True))
    return next(score for completion, score in pairs if completion is row.completion)


def _message_log(row: TrainingRow, rollout: Rollout) -> list[dict[str, Any]]:
    assert isinstance(row.completion, MessageCompletion)
    prompts = (group.prompt for group in (rollout.drafts, *rollout.refinements))
    same = (prompt for prompt in prompts if prompt.token_ids == row.context_ids)
    # A copy, because NeMo-RL writes loss masks into the message and rows may share a completion.
    message = dict(row.completion.message)
    if row.shaped:
        message["generation_logprobs"] = torch.full_like(message["generation_logprobs"], SHAPED)
    return [user_message(next(same, Prompt("", row.context_ids))), message]

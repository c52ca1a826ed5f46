"""A feedback of one stage: NeMo-RL's own rollout, described by the metrics of the embedded engine.

    run_multi_turn_rollout (as it is) ─ its batch ─> groups of completions ─> igrpo/* metrics

Nothing that NeMo-RL trains on is touched. Its asynchronous rollout keeps a row whose generation
failed, without an answer and with reward 0: that fails the step, as it does with two stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nemo_rl.distributed.batched_data_dict import BatchedDataDict

from igrpo_nemo.environment import Attempt
from igrpo_nemo.metrics import rollout_metrics
from igrpo_nemo.nemo.batches import completion_of
from igrpo_nemo.nemo.engines import RowError
from igrpo_nemo.nemo.environment import EnvironmentClient
from igrpo_nemo.nemo.failure import RolloutError
from igrpo_nemo.nemo.seam import RolloutCall, RunMap
from igrpo_nemo.types import Completion, Group, Problem, Prompt, Rollout, Score, Stage


class SingleStageMap(RunMap):
    """Asks for NeMo-RL's own rollout, which is only looked at.

    Raises `RolloutError` naming the problem where a row has no answer.
    """

    def roll_out(self, call: RolloutCall) -> tuple[BatchedDataDict, dict[str, Any]]:
        batch, metrics = call.as_it_was()
        per_problem = self.spec.feedback.num_trained
        groups = [
            _group(batch, range(start, start + per_problem), self.spec.weights)
            for start in range(0, len(batch["message_log"]), per_problem)
            if float(batch["loss_multiplier"][start]) > 0
        ]
        if "accuracy" not in self.spec.weights:
            groups = self._verified(groups, str(batch["task_name"][0]))
        rollouts = [Rollout(group.problem, group) for group in groups]
        rows = [row for rollout in rollouts for row in self.spec.feedback.training_rows(rollout)]
        lengths = [len(c.token_ids) for group in groups for c in group.completions]
        ours = {
            **rollout_metrics(rollouts, rows),
            "igrpo/generated_tokens": float(sum(lengths)),
            "igrpo/completions": float(len(lengths)),
        }
        return batch, {**metrics, **ours, **self.rolled_out(rollouts)}

    def _verified(self, groups: Sequence[Group], task_name: str) -> list[Group]:
        """With the verdict on accuracy, which a reward without it does not tell."""
        client = EnvironmentClient(self[task_name], self.clock.finished + 1)
        attempts = [Attempt(each.problem, each.prompt, each.completions) for each in groups]
        verdicts = [step.group.scores for step in client.step_all(None, attempts, judged=False)]
        return [
            replace(group, scores=tuple(map(_with_verdict, group.scores, verdict)))
            for group, verdict in zip(groups, verdicts, strict=True)
        ]


def _with_verdict(score: Score, verdict: Score) -> Score:
    components = {**score.components, "accuracy": float(verdict.correct)}
    return Score(score.reward, components, verdict.reason)


def _group(batch: BatchedDataDict, rows: range, weights: Mapping[str, float]) -> Group:
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
    return Group(problem, Stage.DRAFT, prompt, completions, scores)


def _completion(batch: BatchedDataDict, row: int) -> Completion:
    answers = [m for m in batch["message_log"][row] if m["role"] == "assistant"]
    if not answers:
        raise RowError(row, "the engine returned no answer")
    return completion_of(answers[0], truncated=bool(batch["truncated"][row]))


def _score(batch: BatchedDataDict, row: int, weights: Mapping[str, float]) -> Score:
    """The components again, from NeMo-RL's weighted ones in fp32; accuracy is 0 until somebody
    has looked, where the reward has no such part."""
    if len(weights) == 1:
        columns = [batch["total_reward"]]
    else:
        columns = [batch[f"reward{number}"] for number in range(1, len(weights) + 1)]
    components = {
        name: round(float(column[row]) / weight, 6)
        for (name, weight), column in zip(weights.items(), columns, strict=True)
    }
    return Score(float(batch["total_reward"][row]), {"accuracy": 0.0, **components})

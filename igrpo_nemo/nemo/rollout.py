"""What stands in for NeMo-RL's rollout, with its arguments and its return value.

    TwoStageMap     both stages; the batch of trained rows goes back
    ValidationMap   NeMo-RL's own on q and, beside it, both stages, which are only measured
    SingleStageMap  NeMo-RL's own, whose batch is only described by the same metrics

A failure raises `RolloutError` with the problem's id; a group is complete or the step fails.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nemo_rl.distributed.batched_data_dict import BatchedDataDict

from igrpo_nemo.environment import Attempt
from igrpo_nemo.metrics import rollout_metrics
from igrpo_nemo.nemo.batches import completion_of, equally_many, items_of, trained_batch
from igrpo_nemo.nemo.engines import AsyncEngine, BatchEngine
from igrpo_nemo.nemo.environment import EnvironmentClient
from igrpo_nemo.nemo.failure import RolloutError
from igrpo_nemo.nemo.prefetch import Prefetcher
from igrpo_nemo.nemo.seam import RolloutCall, RunMap
from igrpo_nemo.nemo.stages import Backends, Item, at_own_pace, roll_out, together
from igrpo_nemo.nemo.versions import component_key
from igrpo_nemo.types import Group, Rollout, Score, Stage, TrainingRow


class TwoStageMap(RunMap):
    """Rolls out both stages of every problem. `prefetcher` stays in this process."""

    prefetcher: Prefetcher | None = None

    def roll_out(self, call: RolloutCall) -> tuple[BatchedDataDict, dict[str, Any]]:
        batch: BatchedDataDict = call.arguments["input_batch"]
        items = items_of(batch, self.feedback.num_trained)
        rollouts, metrics = two_stages(call, self, items, self.prefetcher)
        problems = [(each, equally_many(each, self.feedback)) for each in rollouts]
        trained = trained_batch(batch, problems, self.weights)
        shown = [rollout for rollout in rollouts if rollout.selection]
        return trained, step_metrics(problems) | metrics | self.rolled_out(shown)


class ValidationMap(RunMap):
    """Validates as NeMo-RL does, single shot on q, as often and as greedily as `igrpo.validation`
    says, and then, beside it, the reward of its answers (functions of the user's) and answers
    under q' (`igrpo.val_draft_conditioned`). `measured` collects them, by metric.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.measured: defaultdict[str, list[float]] = defaultdict(list)

    def roll_out(self, call: RolloutCall) -> tuple[BatchedDataDict, dict[str, Any]]:
        # Before NeMo-RL's own, which writes the answers behind the prompts.
        given, keys = call.arguments, self.config.igrpo
        batch, samples = given["input_batch"], keys.validation.samples
        items = items_of(batch, 1)
        asked = dict(given, input_batch=batch.repeat_interleave(samples))
        if keys.validation.temperature == 0:
            asked["greedy"] = True
        returned = self.watched(replace(call, arguments=asked), items, "validation")
        if keys.reward.functions:
            answered = (each for each in items if not each.overlong)
            groups = [_group(returned[0], each, samples, {}) for each in answered]
            graded = asyncio.run(_graded(client_of(call, self), groups))
            rewards = [score.reward for group in graded for score in group.scores]
            self.measured["val/reward"] += rewards
        if self.feedback.two_stage and keys.val_draft_conditioned:
            rollouts, _ = two_stages(call, self, items)
            groups = [group for rollout in rollouts for group in rollout.refinements]
            rights = [float(score.correct) for group in groups for score in group.scores]
            self.measured["val/draft_conditioned_accuracy"] += rights
        return returned

    def take(self) -> dict[str, float]:
        """Means over the validation that is over."""
        taken, self.measured = self.measured, defaultdict(list)
        return {name: sum(values) / len(values) for name, values in taken.items() if values}


class SingleStageMap(RunMap):
    """Asks for NeMo-RL's own rollout, which is only looked at.

    Its asynchronous one keeps a row whose generation failed, without an answer and with reward 0:
    that fails the step here, as it does with two stages.
    """

    def roll_out(self, call: RolloutCall) -> tuple[BatchedDataDict, dict[str, Any]]:
        feedback, weights = self.feedback, self.weights
        items = items_of(call.arguments["input_batch"], feedback.num_trained)
        batch, metrics = self.watched(call, items, Stage.DRAFT)
        answered = (each for each in items if not each.overlong)
        groups = [_group(batch, each, feedback.num_trained, weights) for each in answered]
        if "accuracy" not in weights:
            groups = asyncio.run(self._verified(groups, call))
        rollouts = [Rollout(group.problem, group) for group in groups]
        rows = [row for rollout in rollouts for row in feedback.training_rows(rollout)]
        ours = rollout_metrics(rollouts, rows) | _generated(_lengths(rollouts))
        return batch, {**metrics, **ours, **self.rolled_out(rollouts)}

    async def _verified(self, groups: Sequence[Group], call: RolloutCall) -> list[Group]:
        """With the verdict on accuracy, which a reward without it does not tell."""
        found = await _graded(client_of(call, self), groups, judged=False)
        verified = []
        for group, graded in zip(groups, found, strict=True):
            scores = tuple(
                Score(score.reward, {**score.components, "accuracy": float(v.correct)}, v.reason)
                for score, v in zip(group.scores, graded.scores, strict=True)
            )
            verified.append(replace(group, scores=scores))
        return verified


def two_stages(
    call: RolloutCall,
    task_to_env: RunMap,
    items: Sequence[Item],
    prefetcher: Prefetcher | None = None,
) -> tuple[list[Rollout], dict[str, Any]]:
    """The rollouts of a call's problems, in order, and what the call measured.

    With drafts from the step before and for the next one where the prefetcher has them.
    """
    given = call.arguments
    batch = given["input_batch"]
    stops = batch.get("stop_strings")
    make, run = (AsyncEngine, at_own_pace) if call.concurrently else (BatchEngine, roll_out)
    engine = make(
        given["policy_generation"],
        given["tokenizer"],
        stop_strings=stops[0] if stops else None,
        greedy=given.get("greedy", False),
    )
    client = client_of(call, task_to_env)
    drafts = prefetcher and prefetcher.take(batch)
    following = prefetcher and prefetcher.upcoming(batch)
    upcoming = [] if following is None else items_of(following, 1)
    with task_to_env.alarm() as alarm:
        on = Backends(engine, client, task_to_env.feedback.num_drafts, alarm)
        rollouts, ahead = asyncio.run(run(items, on, drafts, upcoming))
    metrics: dict[str, Any] = {f"timing/{name}": s for name, s in engine.seconds.items()}
    if metrics:
        metrics["timing/reward"] = client.seconds
    if engine.worker_tokens:
        metrics["per_worker_token_counts"] = dict(engine.worker_tokens)
    if prefetcher is not None:
        metrics |= prefetcher.keep(ahead, rollouts)
    return rollouts, metrics


def client_of(call: RolloutCall, task_to_env: RunMap) -> EnvironmentClient:
    """The environment of a call's problems; its steps bear the number of the training step."""
    task = str(call.arguments["input_batch"]["task_name"][0])
    return EnvironmentClient(task_to_env[task], task_to_env.clock.finished + 1)


async def _graded(
    client: EnvironmentClient, groups: Sequence[Group], *, judged: bool = True
) -> list[Group]:
    """Groups that NeMo-RL sampled, as the environment scores them."""
    attempts = [Attempt(each.problem, each.prompt, each.completions) for each in groups]
    steps = await together([client.step(None, each, judged=judged) for each in attempts])
    return [step.group for step in steps]


def step_metrics(problems: Sequence[tuple[Rollout, Sequence[TrainingRow]]]) -> dict[str, Any]:
    """The core's `igrpo/*` metrics, and those that NeMo-RL reads."""
    rollouts = [rollout for rollout, _ in problems]
    trained = [row for _, rows in problems for row in rows]
    lengths = _lengths(rollouts)
    return {
        **rollout_metrics(
            [each for each in rollouts if each.selection is not None],
            [row for row in trained if row.weight],
        ),
        "mean_gen_tokens_per_sample": sum(lengths) / len(lengths),
        "max_gen_tokens_per_sample": max(lengths),
        "truncation_rate": sum(row.completion.truncated for row in trained) / len(trained),
        **_generated(lengths),
    }


def _generated(lengths: Sequence[int]) -> dict[str, float]:
    tokens, completions = float(sum(lengths)), float(len(lengths))
    return {"igrpo/generated_tokens": tokens, "igrpo/completions": completions}


def _lengths(rollouts: Sequence[Rollout]) -> list[int]:
    groups = [group for each in rollouts for group in (each.drafts, *each.refinements)]
    return [len(completion.token_ids) for group in groups for completion in group.completions]


def _group(batch: BatchedDataDict, item: Item, size: int, weights: Mapping[str, float]) -> Group:
    """A problem's rows in the batch that NeMo-RL's own rollout returned. Their components again,
    from NeMo-RL's weighted ones in fp32; accuracy is 0 until somebody has looked, where the reward
    has no such part."""
    completions, scores = [], []
    for row in range(item.position * size, (item.position + 1) * size):
        log, truncated = batch["message_log"][row], bool(batch["truncated"][row])
        with RolloutError.at(item.problem, Stage.DRAFT):
            completions.append(completion_of(log, truncated=truncated))
        components = {"accuracy": 0.0}
        for number, (name, weight) in enumerate(weights.items(), start=1):
            column = component_key(number, name) if len(weights) > 1 else "total_reward"
            components[name] = round(float(batch[column][row]) / weight, 6)
        scores.append(Score(float(batch["total_reward"][row]), components))
    return Group(item.problem, Stage.DRAFT, item.prompt, tuple(completions), tuple(scores))

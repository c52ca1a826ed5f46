"""What stands in for NeMo-RL's rollout, with its arguments and its return value.

    TrainingMap     the feedback's stages, one or two; the batch of trained rows goes back
    ValidationMap   NeMo-RL's own on q and, beside it, both stages, which are only measured

A failure raises `RolloutError` with the problem's id; a group is complete or the step fails.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
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
from igrpo_nemo.types import Rollout, TrainingRow


class TrainingMap(RunMap):
    """Rolls out the stages of every problem. `prefetcher` stays in this process."""

    prefetcher: Prefetcher | None = None

    def roll_out(self, call: RolloutCall) -> tuple[BatchedDataDict, dict[str, Any]]:
        batch: BatchedDataDict = call.arguments["input_batch"]
        items = items_of(batch, self.feedback.num_trained)
        rollouts, metrics = two_stages(call, self, items, self.prefetcher)
        pairs = list(zip(items, rollouts, strict=True))
        whole = [rollout for item, rollout in pairs if not item.overlong]
        problems = [
            (each, equally_many(each, self.feedback, item.overlong)) for item, each in pairs
        ]
        trained = trained_batch(batch, problems, self.weights)
        return trained, step_metrics(whole, problems) | metrics | self.rolled_out(whole)


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
            answered = [
                _answered(returned[0], each, samples) for each in items if not each.overlong
            ]
            self.measured["val/reward"] += asyncio.run(_rewards(client_of(call, self), answered))
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


async def _rewards(client: EnvironmentClient, attempts: Sequence[Attempt]) -> list[float]:
    """Of answers that NeMo-RL sampled, as the environment scores them."""
    steps = await together([client.step(None, each) for each in attempts])
    return [score.reward for step in steps for score in step.group.scores]


def _answered(batch: BatchedDataDict, item: Item, size: int) -> Attempt:
    """A problem's rows in the batch that NeMo-RL's own rollout returned."""
    completions = []
    for row in range(item.position * size, (item.position + 1) * size):
        log, truncated = batch["message_log"][row], bool(batch["truncated"][row])
        with RolloutError.at(item.problem, "validation"):
            completions.append(completion_of(log, truncated=truncated))
    return Attempt(item.problem, item.prompt, tuple(completions))


def step_metrics(
    whole: Sequence[Rollout], problems: Sequence[tuple[Rollout, Sequence[TrainingRow]]]
) -> dict[str, Any]:
    """The core's `igrpo/*` metrics, and those that NeMo-RL reads. `whole` are the rollouts of
    `problems` whose prompt was not cut."""
    trained = [row for _, rows in problems for row in rows]
    lengths = _lengths([rollout for rollout, _ in problems])
    return {
        **rollout_metrics(whole, [row for row in trained if row.weight]),
        "mean_gen_tokens_per_sample": sum(lengths) / len(lengths),
        "max_gen_tokens_per_sample": max(lengths),
        "truncation_rate": sum(row.completion.truncated for row in trained) / len(trained),
        "igrpo/generated_tokens": float(sum(lengths)),
        "igrpo/completions": float(len(lengths)),
    }


def _lengths(rollouts: Sequence[Rollout]) -> list[int]:
    groups = [group for each in rollouts for group in (each.drafts, *each.refinements)]
    return [len(completion.token_ids) for group in groups for completion in group.completions]

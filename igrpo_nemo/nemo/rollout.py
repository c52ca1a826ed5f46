"""The two-stage rollout that stands in for NeMo-RL's, with its arguments and its return value.

    synchronous engine   all drafts, then all refinements, one call each
    asynchronous engine  every problem at its own pace

Returns the batch of trained rows and the rollout's metrics. A failure raises `RolloutError` with
the problem's id; a group is complete or the step fails.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nemo_rl.distributed.batched_data_dict import BatchedDataDict

from igrpo_nemo.environment import Attempt, StepReturn
from igrpo_nemo.feedback import NextPrompt
from igrpo_nemo.metrics import rollout_metrics, short_circuit_metrics
from igrpo_nemo.nemo.batches import TrainedRows, items_of, trained_batch
from igrpo_nemo.nemo.engines import AsyncEngine, BatchEngine
from igrpo_nemo.nemo.environment import NemoEnvironment
from igrpo_nemo.nemo.errors import RolloutError, RowError
from igrpo_nemo.nemo.prefetch import prefetch_metrics
from igrpo_nemo.nemo.spec import TwoStageMap
from igrpo_nemo.nemo.stages import Ahead, Backends, Item, roll_out, unscored
from igrpo_nemo.types import Completion, Prompt, Rollout, Stage

AHEAD = "draft ahead"
OVERLONG = "overlong"
WAITING_THREADS = 64
"""Environment steps that may wait at the same time, beside asyncio's own small pool."""


def two_stage_rollout(
    *,
    policy_generation: Any,
    input_batch: BatchedDataDict,
    tokenizer: Any,
    task_to_env: TwoStageMap,
    greedy: bool = False,
    concurrently: bool,
    **_: Any,
) -> tuple[BatchedDataDict, dict[str, Any]]:
    """Both stages of every problem of the batch.

    `concurrently`: every problem at its own pace on the asynchronous engine; else each stage in
    one call of the synchronous engine.
    """
    call = _Call(input_batch, task_to_env)
    make = AsyncEngine if concurrently else BatchEngine
    engine = make(policy_generation, tokenizer, stop_strings=call.stop_strings, greedy=greedy)
    if isinstance(engine, AsyncEngine):
        return call.result(_at_their_own_pace(call, engine))
    environment = NemoEnvironment(task_to_env, call.task_name, call.step)
    drafted = draft_batch(call, engine, environment)
    return call.result(refine_batch(call, drafted, engine, environment))


def _at_their_own_pace(call: _Call, engine: AsyncEngine) -> list[Rollout]:
    workers = min(WAITING_THREADS, len(call.items))
    with ThreadPoolExecutor(workers, thread_name_prefix="igrpo-environment") as executor:
        environment = NemoEnvironment(call.map, call.task_name, call.step, executor)
        backends = Backends(engine, environment, call.spec.feedback, call.spec.short_circuit)
        rollouts = asyncio.run(_drained(call, backends, engine))
    if backends.short_circuit.mode == "index_order":
        starts, problems = backends.early_starts, len(call.items)
        call.metrics["igrpo/early_refinements_kept"] = starts.kept / problems
        call.metrics["igrpo/early_refinements_dropped"] = starts.dropped / problems
    if engine.worker_tokens:
        call.metrics["per_worker_token_counts"] = engine.worker_tokens
    return rollouts


async def _drained(call: _Call, backends: Backends, engine: AsyncEngine) -> list[Rollout]:
    rollouts = await roll_out(call.items, backends, call.taken_drafts, call.ahead)
    await engine.drain()
    return rollouts


class _Call:
    """One rollout: its batch as plain data, what was prefetched for it, what it measures."""

    def __init__(self, batch: BatchedDataDict, task_to_env: TwoStageMap) -> None:
        self.batch, self.map, self.spec = batch, task_to_env, task_to_env.spec
        self.items = items_of(batch, self.spec.feedback.num_trained)
        self.step = task_to_env.clock.finished + 1
        self.task_name = str(batch["task_name"][0])
        stops = batch.get("stop_strings")
        self.stop_strings = stops[0] if stops else None
        self.metrics: dict[str, Any] = {}
        prefetcher = task_to_env.prefetcher
        self.taken = None if prefetcher is None else prefetcher.take(batch, self.items)
        self.ahead = Ahead([] if prefetcher is None else prefetcher.upcoming(batch))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        key = f"timing/{name}"
        self.metrics[key] = self.metrics.get(key, 0.0) + time.perf_counter() - start

    @property
    def taken_drafts(self) -> dict[int, Sequence[Completion]] | None:
        return None if self.taken is None else dict(enumerate(self.taken.drafts))

    def result(self, rollouts: list[Rollout]) -> tuple[BatchedDataDict, dict[str, Any]]:
        """The trained batch, the metrics; keeps what was drafted ahead for the next call."""
        problems = [TrainedRows.of(rollout, self.spec.feedback) for rollout in rollouts]
        trained = trained_batch(self.batch, problems, self.spec.weights)
        prefetcher = self.map.prefetcher
        metrics = step_metrics(problems) | prefetch_metrics(prefetcher, self.taken, rollouts)
        if prefetcher is not None:
            drafts = [self.ahead.drafts[item.position] for item in self.ahead.upcoming]
            prefetcher.keep(self.ahead.upcoming, drafts)
        shown = [each.rollout for each in problems if each.rollout.selection]
        if self.spec.short_circuit.enabled:
            metrics |= short_circuit_metrics(shown, self.spec.feedback.num_drafts)
        return trained, metrics | self.metrics | self.map.rolled_out(shown)


@dataclass(frozen=True, slots=True)
class _Request:
    """A completion to sample in a batch, and whose it is."""

    item: Item
    stage: str
    prompt: Prompt


def _sample(engine: BatchEngine, requests: Sequence[_Request]) -> list[Completion]:
    """One call of the engine. Raises `RolloutError` naming the problem of a bad row."""
    if not requests:
        return []
    first = requests[0]
    try:
        return engine.sample_all([request.prompt for request in requests])
    except RowError as error:
        bad = requests[error.row]
        raise RolloutError(f"problem {bad.item.problem.id}, stage {bad.stage}: {error}") from error
    except Exception as error:  # the boundary to the engine, whose error concerns every row
        raise RolloutError(
            f"stage {first.stage} of {len(requests)} completions, problem "
            f"{first.item.problem.id} and following: {' '.join(str(error).split())[:500]}"
        ) from error


def draft_batch(
    call: _Call, engine: BatchEngine, environment: NemoEnvironment
) -> dict[int, StepReturn]:
    """Stage 1 of the batch, by position; problems that NeMo-RL cut have none."""
    N = call.spec.feedback.num_drafts
    items = [item for item in call.items if not item.overlong]
    drafts = call.taken_drafts
    if drafts is None:
        with call.timed("draft"):
            wanted = [_Request(i, Stage.DRAFT, i.prompt) for i in items for _ in range(N)]
            sampled = _sample(engine, wanted)
        drafts = {item.position: sampled[n * N : (n + 1) * N] for n, item in enumerate(items)}
    attempts = [Attempt(i.problem, i.prompt, tuple(drafts[i.position])) for i in items]
    steps = _grade(call, environment, Stage.DRAFT, attempts)
    return {item.position: step for item, step in zip(items, steps, strict=True)}


def refine_batch(
    call: _Call,
    drafted: dict[int, StepReturn],
    engine: BatchEngine,
    environment: NemoEnvironment,
) -> list[Rollout]:
    """Stage 2 of the batch and, in the same call of the engine, the next step's drafts.

    The rows of a problem and the drafts of its place in the next batch stand side by side, so that
    contiguous shards get equal shares of both.
    """
    requests: list[_Request] = []
    upcoming = {item.position: item for item in call.ahead.upcoming}
    for item in call.items:
        requests += _stage_two_requests(item, drafted)
        following = upcoming.get(item.position)
        if following is not None:
            N = call.spec.feedback.num_drafts
            requests += [_Request(following, AHEAD, following.prompt)] * N
    with call.timed("refine"):
        sampled = _sample(engine, requests)
    answers: dict[tuple[int, str], list[Completion]] = {}
    for request, completion in zip(requests, sampled, strict=True):
        answers.setdefault((request.item.position, request.stage), []).append(completion)
    for position in upcoming:
        call.ahead.drafts[position] = answers[position, AHEAD]
    attempts = [
        Attempt(item.problem, each.prompt, tuple(completions))
        for item in call.items
        if not item.overlong
        for each, completions in _shared_out(
            drafted[item.position], answers.get((item.position, Stage.REFINE), [])
        )
    ]
    groups = iter(_grade(call, environment, Stage.REFINE, attempts))
    return [
        unscored(item, answers[item.position, OVERLONG][0])
        if item.overlong
        else _rollout(item, drafted[item.position], groups)
        for item in call.items
    ]


def _stage_two_requests(item: Item, drafted: dict[int, StepReturn]) -> list[_Request]:
    if item.overlong:
        return [_Request(item, OVERLONG, item.prompt)]
    return [
        _Request(item, Stage.REFINE, each.prompt)
        for each in drafted[item.position].observations
        for _ in range(each.num_samples)
    ]


def _shared_out(
    step: StepReturn, completions: Sequence[Completion]
) -> Iterator[tuple[NextPrompt, list[Completion]]]:
    rest = iter(completions)
    for each in step.observations:
        yield each, [next(rest) for _ in range(each.num_samples)]


def _rollout(item: Item, step: StepReturn, groups: Iterator[StepReturn]) -> Rollout:
    refinements = tuple(next(groups).group for _ in step.observations)
    return Rollout(item.problem, step.group, step.selection, refinements)


def _grade(
    call: _Call, environment: NemoEnvironment, stage: Stage, attempts: Sequence[Attempt]
) -> list[StepReturn]:
    if not attempts:
        return []
    with call.timed("reward"), RolloutError.at(attempts[0].problem, f"{stage}, rewards"):
        return environment.step_all(stage, attempts)


def step_metrics(problems: Sequence[TrainedRows]) -> dict[str, Any]:
    """The core's `igrpo/*` metrics, and those that NeMo-RL reads."""
    rollouts = [each.rollout for each in problems if each.rollout.selection is not None]
    rows = [row for each in problems if each.weight for row in each.rows]
    lengths = [
        len(completion.token_ids)
        for each in problems
        for group in (each.rollout.drafts, *each.rollout.refinements)
        for completion in group.completions
    ]
    trained = [row for each in problems for row in each.rows]
    truncated = sum(row.completion.truncated for row in trained)
    return {
        **rollout_metrics(rollouts, rows),
        "mean_gen_tokens_per_sample": sum(lengths) / len(lengths),
        "max_gen_tokens_per_sample": max(lengths),
        "truncation_rate": truncated / len(trained),
        "igrpo/generated_tokens": float(sum(lengths)),
        "igrpo/completions": float(len(lengths)),
    }

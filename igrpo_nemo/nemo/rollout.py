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
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nemo_rl.distributed.batched_data_dict import BatchedDataDict

from igrpo_nemo.environment import Attempt, StepReturn
from igrpo_nemo.metrics import rollout_metrics
from igrpo_nemo.nemo.batches import TrainedRows, items_of, trained_batch
from igrpo_nemo.nemo.engines import AsyncEngine, BatchEngine, RowError
from igrpo_nemo.nemo.environment import EnvironmentClient
from igrpo_nemo.nemo.failure import RolloutError
from igrpo_nemo.nemo.prefetch import Prefetcher, roll_out_fused
from igrpo_nemo.nemo.seam import RolloutCall, RunMap
from igrpo_nemo.nemo.stages import Backends, Item, roll_out, unscored
from igrpo_nemo.types import Completion, Prompt, Rollout, Stage


class TwoStageMap(RunMap):
    """Rolls out both stages of every problem. `prefetcher` stays in this process."""

    prefetcher: Prefetcher | None = None

    def roll_out(self, call: RolloutCall) -> tuple[BatchedDataDict, dict[str, Any]]:
        batch: BatchedDataDict = call.arguments["input_batch"]
        feedback = self.spec.feedback
        step = _TwoStages(call, self, items_of(batch, feedback.num_trained))
        rollouts = step.run(self.prefetcher)
        problems = [TrainedRows.of(rollout, feedback) for rollout in rollouts]
        trained = trained_batch(batch, problems, self.spec.weights)
        shown = [rollout for rollout in rollouts if rollout.selection]
        return trained, step_metrics(problems) | step.metrics | self.rolled_out(shown)


class ValidationMap(RunMap):
    """Validates as NeMo-RL does, single shot on q, and then, beside it, under q'.

    `conditioned` collects, for each refinement, whether it was right; whoever logs a validation
    takes them out (`igrpo.val_draft_conditioned`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conditioned: list[bool] = []

    def roll_out(self, call: RolloutCall) -> tuple[BatchedDataDict, dict[str, Any]]:
        # Before NeMo-RL's own, which writes the answers behind the prompts.
        items = items_of(call.arguments["input_batch"], 1)
        returned = call.as_it_was()
        for rollout in _TwoStages(call, self, items).run():
            for group in rollout.refinements:
                self.conditioned += [score.correct for score in group.scores]
        return returned

    def take(self) -> list[bool]:
        """Of the validation that is over."""
        taken, self.conditioned = self.conditioned, []
        return taken


class _TwoStages:
    """One call: its problems, the engine and the environment, and what it measures."""

    def __init__(self, call: RolloutCall, task_to_env: RunMap, items: Sequence[Item]) -> None:
        given = call.arguments
        batch = given["input_batch"]
        stops = batch.get("stop_strings")
        make = AsyncEngine if call.concurrently else BatchEngine
        self.engine: AsyncEngine | BatchEngine = make(
            given["policy_generation"],
            given["tokenizer"],
            stop_strings=stops[0] if stops else None,
            greedy=given.get("greedy", False),
        )
        self.environment = EnvironmentClient(
            task_to_env[str(batch["task_name"][0])], task_to_env.clock.finished + 1
        )
        self.num_drafts = task_to_env.spec.feedback.num_drafts
        self.batch, self.items = batch, items
        self.metrics: dict[str, Any] = {}

    def run(self, prefetcher: Prefetcher | None = None) -> list[Rollout]:
        """The rollouts, in the order of the batch; with drafts from the step before and for the
        next one where a prefetcher has them."""
        taken = prefetcher and prefetcher.take(self.batch, self.items)
        following = prefetcher and prefetcher.upcoming(self.batch)
        upcoming = [] if following is None else items_of(following, 1)
        drafts = None if taken is None else list(taken.drafts)
        if isinstance(self.engine, AsyncEngine):
            rollouts, ahead = asyncio.run(self._at_their_own_pace(self.engine, drafts, upcoming))
        else:
            drafted = self._draft_batch(self.engine, drafts)
            rollouts, ahead = self._refine_batch(self.engine, drafted, upcoming)
        if prefetcher is not None:
            self.metrics |= prefetcher.metrics(taken, rollouts)
            prefetcher.keep(upcoming, ahead)
        return rollouts

    async def _at_their_own_pace(
        self,
        engine: AsyncEngine,
        drafts: Sequence[Sequence[Completion]] | None,
        upcoming: Sequence[Item],
    ) -> tuple[list[Rollout], list[list[Completion]]]:
        on = Backends(engine, self.environment, self.num_drafts)
        if drafts is None and not upcoming:
            rollouts, ahead = await roll_out(self.items, on), []
        else:
            rollouts, ahead = await roll_out_fused(self.items, on, drafts, upcoming)
        if engine.worker_tokens:
            self.metrics["per_worker_token_counts"] = engine.worker_tokens
        return rollouts, ahead

    def _draft_batch(
        self, engine: BatchEngine, drafts: Sequence[Sequence[Completion]] | None
    ) -> dict[int, StepReturn]:
        """Stage 1 of the batch, by position; problems that NeMo-RL cut have none."""
        items = [item for item in self.items if not item.overlong]
        if drafts is None:
            wanted = [_Wanted(i, Stage.DRAFT, i.prompt, self.num_drafts) for i in items]
            with self._timed("draft"):
                sampled = _sample(engine, wanted)
        else:
            sampled = [drafts[item.position] for item in items]
        attempts = [
            Attempt(item.problem, item.prompt, tuple(completions))
            for item, completions in zip(items, sampled, strict=True)
        ]
        steps = self._grade(Stage.DRAFT, attempts)
        return {item.position: step for item, step in zip(items, steps, strict=True)}

    def _refine_batch(
        self, engine: BatchEngine, drafted: dict[int, StepReturn], upcoming: Sequence[Item]
    ) -> tuple[list[Rollout], list[list[Completion]]]:
        """Stage 2 of the batch and, in the same call of the engine, the next step's drafts.

        The rows of a problem and the drafts of its place in the next batch stand side by side, so
        that contiguous shards get equal shares of both.
        """
        wanted: list[_Wanted] = []
        for item in self.items:
            wanted += _stage_two(item, drafted)
            if item.position < len(upcoming):
                following = upcoming[item.position]
                wanted.append(_Wanted(following, AHEAD, following.prompt, self.num_drafts))
        with self._timed("refine"):
            sampled = list(zip(wanted, _sample(engine, wanted), strict=True))
        attempts = [
            Attempt(each.item.problem, each.prompt, tuple(completions))
            for each, completions in sampled
            if each.stage == Stage.REFINE
        ]
        groups = iter(self._grade(Stage.REFINE, attempts))
        cut = {each.item.position: found[0] for each, found in sampled if each.stage == OVERLONG}
        rollouts = [
            unscored(item, cut[item.position])
            if item.overlong
            else _rollout(item, drafted[item.position], groups)
            for item in self.items
        ]
        return rollouts, [completions for each, completions in sampled if each.stage == AHEAD]

    def _grade(self, stage: Stage, attempts: Sequence[Attempt]) -> list[StepReturn]:
        if not attempts:
            return []
        with self._timed("reward"), RolloutError.at(attempts[0].problem, f"{stage}, rewards"):
            return self.environment.step_all(stage, attempts)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        key = f"timing/{name}"
        self.metrics[key] = self.metrics.get(key, 0.0) + time.perf_counter() - start


AHEAD = "draft ahead"
OVERLONG = "overlong"


@dataclass(frozen=True, slots=True)
class _Wanted:
    """`count` completions of a prompt to sample in a batch, and whose they are."""

    item: Item
    stage: str
    prompt: Prompt
    count: int


def _sample(engine: BatchEngine, wanted: Sequence[_Wanted]) -> list[list[Completion]]:
    """One call of the engine. Raises `RolloutError` naming the problem of a bad row."""
    rows = [each for each in wanted for _ in range(each.count)]
    if not rows:
        return []
    try:
        sampled = iter(engine.sample_all([row.prompt for row in rows]))
    except RowError as error:
        bad = rows[error.row]
        raise RolloutError(f"problem {bad.item.problem.id}, stage {bad.stage}: {error}") from error
    except Exception as error:  # the boundary to the engine, whose error concerns every row
        raise RolloutError(
            f"stage {rows[0].stage} of {len(rows)} completions, problem "
            f"{rows[0].item.problem.id} and following: {' '.join(str(error).split())[:500]}"
        ) from error
    return [[next(sampled) for _ in range(each.count)] for each in wanted]


def _stage_two(item: Item, drafted: dict[int, StepReturn]) -> list[_Wanted]:
    if item.overlong:
        return [_Wanted(item, OVERLONG, item.prompt, 1)]
    return [
        _Wanted(item, Stage.REFINE, each.prompt, each.num_samples)
        for each in drafted[item.position].observations
    ]


def _rollout(item: Item, step: StepReturn, groups: Iterator[StepReturn]) -> Rollout:
    refinements = tuple(next(groups).group for _ in step.observations)
    return Rollout(item.problem, step.group, step.selection, refinements)


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

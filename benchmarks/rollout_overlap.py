"""What the two stages cost on an engine like vLLM, and what overlapping them wins back.

    igrpo_nemo.nemo.stages (the product's rollout) ─ asyncio in virtual time ─> EngineModel
    EngineModel: continuous batching; a decode step lasts BASE + PER_SEQUENCE x running sequences

All ratios are to GRPO's generation of the same N + G completions per problem. No GPU, no NeMo-RL
and no waiting: the event loop's clock is the model's. Run it as

    python benchmarks/rollout_overlap.py [--json FILE] [--problems 8,16,...] [--steps 6]
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import itertools
import json
import math
import random
import selectors
import statistics
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from igrpo_nemo.environment import Attempt, StepReturn
from igrpo_nemo.feedback import BestDraft, NextPrompt
from igrpo_nemo.nemo.short_circuit import ShortCircuit
from igrpo_nemo.nemo.stages import (
    Ahead,
    Backends,
    Item,
    draft_stage,
    refine_stage,
    roll_out,
    together,
)
from igrpo_nemo.types import (
    Completion,
    Group,
    Problem,
    Prompt,
    Rollout,
    Score,
    Stage,
    StopReason,
)

BASE_S = 0.012
PER_SEQUENCE_S = 0.000075
MEAN_TOKENS, SIGMA, MAX_TOKENS = 1_500, 0.8, 4_096
MAX_RUNNING = 1_024
"""Sequences that the engine decodes at a time; the others wait."""
REWARD_S = 0.01
"""A group's rewards."""
DRAFTS = REFINEMENTS = 4
SUCCESS = 0.6
"""Chance that a draft earns the highest reward, for the short circuit."""
TRAINING_SHARE = (0.5, 0.8, 1.0)
"""iGRPO's training time as a share of GRPO's: half the rows, but longer contexts."""
TRAINING_TIMES = (0.25, 0.5, 1.0, 2.0)
"""GRPO's training time, in GRPO generations."""
PROBLEMS = (8, 16, 32, 64, 128, 256, 512, 1_024)
STEP_PROBLEMS = 16
"""Problems per engine for whole steps."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self.now


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("deadlock: nothing is scheduled and nothing can arrive")
        self._loop.now += timeout
        return super().select(0)


def in_virtual_time(work: Callable[[], Awaitable[Any]]) -> float:
    """Virtual seconds that a coroutine takes."""
    loop = VirtualLoop()
    try:
        loop.run_until_complete(work())
        return loop.now
    finally:
        loop.close()


class EngineModel:
    """Continuous batching as a fluid: every running sequence gains one token per decode step.

    Between admissions and departures the step's length is constant, so a sequence ends when the
    common progress has grown by its length. A cancelled request leaves at once.
    """

    def __init__(self, seed: int, cut: bool) -> None:
        self._seed = seed
        self._cut = cut
        self._drawn: dict[str, int] = {}
        self._progress = 0.0
        self._updated = 0.0
        self._ends: list[tuple[float, int]] = []
        self._running: dict[int, asyncio.Future[None]] = {}
        self._queue: dict[int, tuple[int, asyncio.Future[None]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._count = 0

    async def sample(self, prompt: Prompt, route: str) -> Completion:
        """The next completion of a route, after the time that it takes to decode.

        Lengths and verdicts are named by (seed, route, number): every variant does the same work.
        """
        number = self._drawn[route] = self._drawn.get(route, 0) + 1
        rng = random.Random(f"{self._seed}/{route}/{number}")
        length, right = draw_length(rng, self._cut), rng.random() < SUCCESS
        await self._decode(length)
        cut = self._cut and length == MAX_TOKENS
        reason = StopReason.LENGTH if cut else StopReason.EOS
        return Completion("right" if right else "wrong", (0,) * length, (), reason)

    async def _decode(self, length: int) -> None:
        loop = asyncio.get_running_loop()
        self._advance(loop.time())
        self._count += 1
        number, done = self._count, loop.create_future()
        self._queue[number] = (length, done)
        self._admit(loop)
        try:
            await done
        finally:
            self._advance(loop.time())
            self._queue.pop(number, None)
            self._running.pop(number, None)
            self._admit(loop)

    def _advance(self, now: float) -> None:
        step_s = BASE_S + PER_SEQUENCE_S * len(self._running)
        self._progress += (now - self._updated) / step_s
        self._updated = now

    def _admit(self, loop: asyncio.AbstractEventLoop) -> None:
        free = MAX_RUNNING - len(self._running)
        for number in list(itertools.islice(self._queue, free)):
            length, done = self._queue.pop(number)
            self._running[number] = done
            heapq.heappush(self._ends, (self._progress + length, number))
        while self._ends and self._ends[0][1] not in self._running:
            heapq.heappop(self._ends)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if self._ends:
            step_s = BASE_S + PER_SEQUENCE_S * len(self._running)
            rest = max(self._ends[0][0] - self._progress, 0.0)
            self._timer = loop.call_later(rest * step_s, self._finish, loop)

    def _finish(self, loop: asyncio.AbstractEventLoop) -> None:
        self._advance(loop.time())
        while self._ends and self._ends[0][0] <= self._progress + 1e-6:
            _, number = heapq.heappop(self._ends)
            done = self._running.pop(number, None)
            if done is not None and not done.done():
                done.set_result(None)
        self._timer = None
        self._admit(loop)


def draw_length(rng: random.Random, cut: bool) -> int:
    """A length up to the cap. What would be longer is drawn again, or cut there."""
    mu = math.log(MEAN_TOKENS) - SIGMA**2 / 2
    while True:
        length = max(1, round(rng.lognormvariate(mu, SIGMA)))
        if length <= MAX_TOKENS:
            return length
        if cut:
            return MAX_TOKENS


class RewardModel:
    """Scores by text after a fixed delay; q' is as long as it wants to be: prefill is free here."""

    def __init__(self, feedback: BestDraft) -> None:
        self._feedback = feedback

    async def step(
        self, stage: Stage | None, attempt: Attempt, *, scores: tuple[Score, ...] | None = None
    ) -> StepReturn:
        if scores is None:
            await asyncio.sleep(REWARD_S)
            scores = tuple(Score(float(c.text == "right")) for c in attempt.completions)
        group = Group(
            attempt.problem, stage or Stage.DRAFT, attempt.prompt, attempt.completions, scores
        )
        if stage is not Stage.DRAFT:
            return StepReturn(group, None, (), True)
        selection = self._feedback.select(group, 0)
        following = (NextPrompt(attempt.prompt, self._feedback.num_refinements),)
        return StepReturn(group, selection, following, False)


def problems(count: int) -> list[Item]:
    prompt = Prompt("q", (0,))
    return [Item(Problem(f"p{n}", "q", "a"), prompt, n) for n in range(count)]


def backends(seed: int, cut: bool) -> Backends:
    feedback = BestDraft(DRAFTS, REFINEMENTS)
    return Backends(EngineModel(seed, cut), RewardModel(feedback), feedback)


async def grpo(items: Sequence[Item], on: Backends) -> None:
    """GRPO's generation: N + G completions of q at once."""
    await together(
        [
            on.engine.sample(item.prompt, f"{item.position}/{route}")
            for item in items
            for route, rows in (("draft", DRAFTS), ("refine/0", REFINEMENTS))
            for _ in range(rows)
        ]
    )
    await asyncio.sleep(REWARD_S)


async def barrier(items: Sequence[Item], on: Backends) -> list[Rollout]:
    """iGRPO with a barrier between the stages, as a synchronous engine has it."""
    drafted = await together([draft_stage(item, on) for item in items])
    return await together(
        [refine_stage(item, step, on) for item, step in zip(items, drafted, strict=True)]
    )


async def fused_steps(items: Sequence[Item], on: Backends, steps: int) -> list[float]:
    """Seconds of each step with the next step's drafts beside this step's refinements."""
    loop, seconds, taken = asyncio.get_running_loop(), [], None
    for _ in range(steps):
        start, ahead = loop.time(), Ahead(items)
        await roll_out(items, on, taken, ahead)
        taken = dict(ahead.drafts)
        seconds.append(loop.time() - start)
    return seconds


@dataclass(frozen=True, slots=True)
class Generation:
    """Seconds of one step's generation, mean over seeds."""

    grpo: float
    barrier: float
    pipelined: float
    short_circuit: float
    fused: float

    def ratio(self, name: str) -> float:
        return getattr(self, name) / self.grpo


def measure(count: int, seeds: Sequence[int], steps: int, cut: bool = False) -> Generation:
    """All variants for a number of problems on one engine."""
    items, found = problems(count), []
    exact = ShortCircuit("index_order", best_reward=1.0)
    for seed in seeds:
        found.append([seconds(work, items, seed, cut) for work in (grpo, barrier, roll_out)])
        short = replace(backends(seed, cut), short_circuit=exact)
        found[-1].append(in_virtual_time(partial(roll_out, items, short)))
        found[-1].append(steady_fused(items, backends(seed, cut), steps))
    return Generation(*(statistics.fmean(column) for column in zip(*found, strict=True)))


def seconds(
    work: Callable[[Sequence[Item], Backends], Awaitable[Any]],
    items: Sequence[Item],
    seed: int,
    cut: bool,
) -> float:
    return in_virtual_time(partial(work, items, backends(seed, cut)))


def steady_fused(items: Sequence[Item], on: Backends, steps: int) -> float:
    """A fused step after the first, whose drafts are fresh."""
    found: list[float] = []

    async def run() -> None:
        found.extend(await fused_steps(items, on, steps))

    in_virtual_time(run)
    return statistics.fmean(found[1:])


def whole_steps(generation: Generation, share: float) -> dict[str, dict[str, float]]:
    """Step time over GRPO's by variant and by GRPO's training time in GRPO generations."""
    names = ("barrier", "pipelined", "short_circuit", "fused")
    return {
        f"{training:g}": {
            name: (generation.ratio(name) + share * training) / (1 + training) for name in names
        }
        for training in TRAINING_TIMES
    }


class InstantGeneration:
    """NeMo-RL's asynchronous generation interface, answering at once with `tokens` tokens."""

    cfg = {"backend": "vllm", "vllm_cfg": {"async_engine": True}}

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    async def generate_async(self, data: Any, greedy: bool = False) -> AsyncGenerator[Any, None]:
        import torch
        from nemo_rl.distributed.batched_data_dict import BatchedDataDict

        prompt_ids = data["input_ids"]
        answer = torch.randint(32, 200, (1, self._tokens))
        total = prompt_ids.shape[1] + self._tokens
        yield (
            0,
            BatchedDataDict(
                {
                    "output_ids": torch.cat([prompt_ids, answer], dim=1),
                    "generation_lengths": torch.tensor([self._tokens]),
                    "unpadded_sequence_lengths": torch.tensor([total]),
                    "logprobs": torch.zeros((1, total)),
                    "truncated": torch.tensor([False]),
                }
            ),
        )


def driver_ms_per_completion(count: int, tokens: int = MAX_TOKENS) -> float | None:
    """CPU milliseconds of this process per completion of `tokens` tokens, engine time excluded.

    The asynchronous engine's adapter over NeMo-RL's own `generate_responses_async` (decoding
    included), the rollout, the trained batch and the metrics. None without NeMo-RL.
    """
    try:
        from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    except ImportError:
        return None
    from igrpo_nemo.nemo.batches import TrainedRows, trained_batch
    from igrpo_nemo.nemo.engines import AsyncEngine
    from igrpo_nemo.nemo.rollout import step_metrics
    from igrpo_nemo.run.tokenizer import build_small_tokenizer

    tokenizer = build_small_tokenizer(["a few words for the merges of a tokenizer"] * 8, 320)
    prompt = Prompt("q", tuple(range(32, 160)) * 8)
    items = [replace(item, prompt=prompt) for item in problems(count)]
    feedback = BestDraft(DRAFTS, REFINEMENTS)
    engine = AsyncEngine(InstantGeneration(tokens), tokenizer, stop_strings=None, greedy=False)
    on = Backends(engine, RewardModel(feedback), feedback)
    batch: Any = BatchedDataDict(
        {
            "message_log": [[]] * (count * REFINEMENTS),
            "loss_multiplier": torch_ones(count * REFINEMENTS),
        }
    )
    started = time.process_time()
    trained = [TrainedRows.of(rollout, feedback) for rollout in asyncio.run(roll_out(items, on))]
    trained_batch(batch, trained, {"accuracy": 1.0})
    step_metrics(trained)
    return 1_000 * (time.process_time() - started) / (count * (DRAFTS + REFINEMENTS))


def torch_ones(size: int) -> Any:
    import torch

    return torch.ones(size)


def generation_table(
    counts: Sequence[int], seeds: int, steps: int, cut: bool
) -> dict[int, Generation]:
    """Measures and prints every number of problems."""
    how = "cut there" if cut else "drawn again"
    print(f"\ngeneration over GRPO's at the same budget; lengths above the cap are {how}")
    print(f"{'problems':>9} {'GRPO s':>8} {'barrier':>8} {'pipelined':>10} "
          f"{'index_order':>12} {'fused':>7}")  # fmt: skip
    table = {}
    for count in counts:
        few = max(2, min(seeds, 2_048 // count))
        table[count] = found = measure(count, range(few), steps, cut)
        print(
            f"{count:>9} {found.grpo:>8.1f} {found.ratio('barrier'):>8.3f} "
            f"{found.ratio('pipelined'):>10.3f} {found.ratio('short_circuit'):>12.3f} "
            f"{found.ratio('fused'):>7.3f}",
            flush=True,
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="What overlapping the two stages wins back.")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--problems", default=",".join(map(str, PROBLEMS)))
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5, help="fused steps per seed")
    flags = parser.parse_args()
    counts = [int(part) for part in flags.problems.split(",")]
    started = time.monotonic()
    print(
        f"decode step {1e3 * BASE_S:g} ms + {1e3 * PER_SEQUENCE_S:g} ms per running sequence, at "
        f"most {MAX_RUNNING:,} running; lengths log-normal, mean {MEAN_TOKENS:,}, sigma {SIGMA}, "
        f"cap {MAX_TOKENS:,}; N = {DRAFTS}, G = {REFINEMENTS}; a draft is right with {SUCCESS:g}; "
        f"rewards {1e3 * REWARD_S:g} ms; prefill is not modelled"
    )
    tables = {cut: generation_table(counts, flags.seeds, flags.steps, cut) for cut in (False, True)}
    table = tables[False]
    figures: dict[str, Any] = {
        name: {str(count): table[count].ratio(name) for count in counts}
        for name in ("barrier", "pipelined", "short_circuit", "fused")
    }
    figures["cut_at_the_cap"] = {
        name: {str(count): tables[True][count].ratio(name) for count in counts}
        for name in ("barrier", "pipelined", "short_circuit", "fused")
    }
    reference = table.get(STEP_PROBLEMS) or measure(STEP_PROBLEMS, range(flags.seeds), flags.steps)
    figures["fused_step_by_share"] = {}
    for share in TRAINING_SHARE:
        steps = whole_steps(reference, share)
        figures["fused_step_by_share"][f"{share:g}"] = {t: row["fused"] for t, row in steps.items()}
        print(f"\nwhole steps over GRPO's, {STEP_PROBLEMS} problems per engine, iGRPO's training "
              f"{share:g} of GRPO's")  # fmt: skip
        print(f"{'training':>9} {'barrier':>8} {'pipelined':>10} {'index_order':>12} {'fused':>7}")
        for training, row in steps.items():
            print(f"{training:>9} {row['barrier']:>8.3f} {row['pipelined']:>10.3f} "
                  f"{row['short_circuit']:>12.3f} {row['fused']:>7.3f}")  # fmt: skip
    figures["fused_step"] = figures["fused_step_by_share"]["0.8"]
    costs = {count: driver_ms_per_completion(count) for count in (8, 32, 128)}
    figures["driver_ms_per_completion"] = costs[128]
    if costs[128] is not None:
        shown = ", ".join(f"{cost:.2f} ms at {count}" for count, cost in costs.items())
        print(f"\ndriver per completion of {MAX_TOKENS:,} tokens, by problems: {shown}")
    else:
        print("\ndriver: not measured, NeMo-RL cannot be imported here")
    if flags.json:
        with open(flags.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()

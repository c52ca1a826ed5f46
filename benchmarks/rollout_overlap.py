"""What the two stages cost on an engine like vLLM, and what overlapping them wins back.

    igrpo_nemo.nemo.stages (the product's rollout) ─ asyncio in virtual time ─> overlap_engine

All ratios are to GRPO's generation of the same N + G completions per problem. No GPU, no NeMo-RL
and no waiting: the event loop's clock is the model's. Run it as

    python benchmarks/rollout_overlap.py [--json FILE] [--problems 8,16,...] [--steps 6]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from overlap_engine import (
    BASE_S,
    MAX_RUNNING,
    MAX_TOKENS,
    MEAN_TOKENS,
    PER_SEQUENCE_S,
    REWARD_S,
    SIGMA,
    SUCCESS,
    EngineModel,
    RewardModel,
    in_virtual_time,
)

from igrpo_nemo.feedback import BestDraft, NextPrompt
from igrpo_nemo.nemo.stages import Backends, Item, Wanted, at_own_pace, roll_out, together
from igrpo_nemo.types import Problem, Prompt, Stage

DRAFTS = REFINEMENTS = 4
TRAINING_SHARE = (0.5, 0.8, 1.0)
"""iGRPO's training time as a share of GRPO's: half the rows, but longer contexts."""
TRAINING_TIMES = (0.25, 0.5, 1.0, 2.0)
"""GRPO's training time, in GRPO generations."""
PROBLEMS = (8, 16, 32, 64, 128, 256, 512, 1_024)
STEP_PROBLEMS = 16
"""Problems per engine for whole steps."""
VARIANTS = ("barrier", "pipelined", "fused")
"""Columns of the tables."""


def problems(count: int) -> list[Item]:
    prompt = Prompt("q", (0,))
    return [Item(Problem(f"p{n}", "q", "a"), prompt, n) for n in range(count)]


def backends(seed: int, cut: bool) -> Backends:
    feedback = BestDraft(DRAFTS, REFINEMENTS)
    return Backends(EngineModel(seed, cut), RewardModel(feedback), DRAFTS)


async def grpo(items: Sequence[Item], on: Backends) -> None:
    """GRPO's generation: N + G completions of q at once."""
    assert isinstance(on.engine, EngineModel)
    await together(
        [
            on.engine.group(Wanted(item, stage, NextPrompt(item.prompt, rows)))
            for item in items
            for stage, rows in ((Stage.DRAFT, DRAFTS), (Stage.REFINE, REFINEMENTS))
        ]
    )
    await asyncio.sleep(REWARD_S)


async def fused_steps(items: Sequence[Item], on: Backends, steps: int) -> list[float]:
    """Seconds of each step with the next step's drafts beside this step's refinements."""
    loop, seconds, drafts = asyncio.get_running_loop(), [], None
    for _ in range(steps):
        start = loop.time()
        _, drafts = await at_own_pace(items, on, drafts, items)
        seconds.append(loop.time() - start)
    return seconds


@dataclass(frozen=True, slots=True)
class Generation:
    """Seconds of one step's generation, mean over seeds, by variant."""

    grpo: float
    variants: dict[str, float]

    def ratio(self, name: str) -> float:
        return self.variants[name] / self.grpo


def measure(count: int, seeds: Sequence[int], steps: int, cut: bool = False) -> Generation:
    """All variants for a number of problems on one engine."""
    items, found = problems(count), []
    for seed in seeds:
        found.append(
            {
                "grpo": seconds(grpo, items, backends(seed, cut)),
                "barrier": seconds(roll_out, items, backends(seed, cut)),
                "pipelined": seconds(at_own_pace, items, backends(seed, cut)),
                "fused": steady_fused(items, backends(seed, cut), steps),
            }
        )
    means = {name: statistics.fmean(each[name] for each in found) for name in found[0]}
    return Generation(means.pop("grpo"), means)


def seconds(
    work: Callable[[Sequence[Item], Backends], Awaitable[Any]],
    items: Sequence[Item],
    on: Backends,
) -> float:
    return in_virtual_time(partial(work, items, on))


def steady_fused(items: Sequence[Item], on: Backends, steps: int) -> float:
    """A fused step after the first, whose drafts are fresh."""
    found: list[float] = []

    async def run() -> None:
        found.extend(await fused_steps(items, on, steps))

    in_virtual_time(run)
    return statistics.fmean(found[1:])


def whole_steps(generation: Generation, share: float) -> dict[str, dict[str, float]]:
    """Step time over GRPO's by variant and by GRPO's training time in GRPO generations."""
    return {
        f"{training:g}": {
            name: (generation.ratio(name) + share * training) / (1 + training) for name in VARIANTS
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
    from igrpo_nemo.nemo.batches import equally_many, trained_batch
    from igrpo_nemo.nemo.engines import AsyncEngine
    from igrpo_nemo.nemo.rollout import step_metrics
    from igrpo_nemo.run.tokenizer import build_small_tokenizer

    tokenizer = build_small_tokenizer(["a few words for the merges of a tokenizer"] * 8, 320)
    prompt = Prompt("q", tuple(range(32, 160)) * 8)
    items = [replace(item, prompt=prompt) for item in problems(count)]
    feedback = BestDraft(DRAFTS, REFINEMENTS)
    engine = AsyncEngine(InstantGeneration(tokens), tokenizer, stop_strings=None, greedy=False)
    on = Backends(engine, RewardModel(feedback), DRAFTS)
    batch: Any = BatchedDataDict(
        {
            "message_log": [[]] * (count * REFINEMENTS),
            "loss_multiplier": torch_ones(count * REFINEMENTS),
        }
    )
    started = time.process_time()
    rollouts, _ = asyncio.run(at_own_pace(items, on))
    trained = [(rollout, equally_many(rollout, feedback)) for rollout in rollouts]
    trained_batch(batch, trained, {"accuracy": 1.0})
    step_metrics(rollouts, trained)
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
    print(f"{'problems':>9} {'GRPO s':>8} {header()}")
    table = {}
    for count in counts:
        few = max(2, min(seeds, 2_048 // count))
        table[count] = found = measure(count, range(few), steps, cut)
        ratios = {name: found.ratio(name) for name in VARIANTS}
        print(f"{count:>9} {found.grpo:>8.1f} {line(ratios)}", flush=True)
    return table


def header() -> str:
    return " ".join(f"{title:>12}" for title in VARIANTS)


def line(ratios: dict[str, float]) -> str:
    return " ".join(f"{ratios[name]:>12.3f}" for name in VARIANTS)


def step_tables(reference: Generation) -> dict[str, dict[str, float]]:
    """Prints whole steps for every share of training; fused ones by share and training time."""
    fused: dict[str, dict[str, float]] = {}
    for share in TRAINING_SHARE:
        steps = whole_steps(reference, share)
        fused[f"{share:g}"] = {training: row["fused"] for training, row in steps.items()}
        print(
            f"\nwhole steps over GRPO's, {STEP_PROBLEMS} problems per engine, iGRPO's training "
            f"{share:g} of GRPO's"
        )
        print(f"{'training':>9} {header()}")
        for training, row in steps.items():
            print(f"{training:>9} {line(row)}")
    return fused


def driver_costs() -> float | None:
    """Prints the driver's cost by number of problems; the one of the largest."""
    costs = {count: driver_ms_per_completion(count) for count in (8, 32, 128)}
    largest = costs[max(costs)]
    if largest is None:
        print("\ndriver: not measured, NeMo-RL cannot be imported here")
        return None
    shown = ", ".join(f"{cost:.2f} ms at {count}" for count, cost in costs.items())
    print(f"\ndriver per completion of {MAX_TOKENS:,} tokens, by problems: {shown}")
    return largest


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
    redrawn, cut = (
        {name: {str(n): found.ratio(name) for n, found in tables[way].items()} for name in VARIANTS}
        for way in (False, True)
    )
    figures: dict[str, Any] = {**redrawn, "cut_at_the_cap": cut}
    reference = tables[False].get(STEP_PROBLEMS) or measure(
        STEP_PROBLEMS, range(flags.seeds), flags.steps
    )
    figures["fused_step_by_share"] = step_tables(reference)
    figures["fused_step"] = figures["fused_step_by_share"]["0.8"]
    figures["driver_ms_per_completion"] = driver_costs()
    if flags.json:
        with open(flags.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()

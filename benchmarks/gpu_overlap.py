"""Generation time of GRPO and of iGRPO's ways to overlap its stages, on NeMo-RL's own engine.

    python benchmarks/gpu_overlap.py [--repeats N] [--limit S] [--json FILE] OVERRIDES...

    grpo       all completions of q, by NeMo-RL's own rollout
    barrier    the drafts of all problems, then the refinements of all
    pipelined  a problem's refinements begin when its drafts have ended
    fused      refinements beside the next step's drafts; the first one draws its own drafts too

OVERRIDES are those of `igrpo train engine=nemo_rl ...`: model, cluster, problems a step, lengths.
NeMo-RL's `setup()` makes policy and vLLM as for a run; then one process measures all four in turn,
under the same weights, and nothing is trained. Every rollout is printed when it has ended, and FILE
holds what was measured so far, so that a run that is cut off has told what it found.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from igrpo_nemo.config import Config, load_config

Roll = Callable[[Any], tuple[Any, dict[str, Any]]]
"""Rolls a batch of problems out."""


class OutOfTime(Exception):
    """The limit is over."""


class Times:
    """Seconds, tokens and longest completion of each rollout, by way."""

    def __init__(self, limit_s: float, file: Path | None, problems: int) -> None:
        self._until, self._file, self._problems = time.monotonic() + limit_s, file, problems
        self._runs: dict[str, list[dict[str, float]]] = {}

    def take(self, way: str, roll: Roll, batch: Any, *, counted: bool = True) -> None:
        if time.monotonic() > self._until:
            raise OutOfTime
        start = time.perf_counter()
        trained, metrics = roll(batch)
        seconds = time.perf_counter() - start
        answers = [
            len(message["token_ids"])
            for log in trained["message_log"]
            for message in log
            if message["role"] == "assistant"
        ]
        tokens = int(metrics.get("igrpo/generated_tokens", sum(answers)))
        run = {"seconds": seconds, "tokens": tokens, "longest": max(answers)}
        print(
            f"{way:11} {seconds:.3f} s  {tokens} tokens, {tokens / seconds:.0f} a second",
            flush=True,
        )
        if counted:
            self._runs.setdefault(way, []).append(run)
            if self._file is not None:
                self._file.write_text(json.dumps(self.result(), indent=1))

    def result(self) -> dict[str, Any]:
        """Mean seconds of each way, and as a multiple of GRPO's."""
        means = {
            way: statistics.fmean(run["seconds"] for run in runs)
            for way, runs in self._runs.items()
        }
        ratios = {way: mean / means["grpo"] for way, mean in means.items() if "grpo" in means}
        return {"problems": self._problems, "seconds": means, "ratios": ratios, "runs": self._runs}


def measure(
    config: Config, total_steps: int, loader: Any, made: dict[str, Any], times: Times, repeats: int
) -> None:
    """All four ways, `repeats` times each, with what NeMo-RL's trainer would be called with."""
    from nemo_rl.algorithms.grpo import refit_policy_generation
    from nemo_rl.experience.rollouts import run_async_multi_turn_rollout as original

    from igrpo_nemo.nemo import rollout, stages
    from igrpo_nemo.nemo.prefetch import LookaheadLoader, Prefetcher
    from igrpo_nemo.nemo.rollout import TrainingMap
    from igrpo_nemo.nemo.seam import RolloutCall, StepClock

    given = made["task_to_env"]
    generation = made["master_config"].policy["generation"]
    refit_policy_generation(
        made["policy"], made["policy_generation"], generation["colocated"]["enabled"]
    )
    environments, clock, ahead = dict(given), StepClock(), LookaheadLoader(loader)
    arguments = {
        "policy_generation": made["policy_generation"],
        "tokenizer": made["tokenizer"],
        "max_seq_len": config.policy.max_total_sequence_length,
        "max_rollout_turns": 1,
        "greedy": False,
    }

    def grpo(batch: Any) -> tuple[Any, dict[str, Any]]:
        rows = batch.repeat_interleave(config.igrpo.budget)
        return original(input_batch=rows, task_to_env=environments, **arguments)

    def two_stages(task_to_env: TrainingMap, *, barrier: bool = False) -> Roll:
        def roll(batch: Any) -> tuple[Any, dict[str, Any]]:
            rows = batch.repeat_interleave(config.feedback.num_trained)
            call = {**arguments, "input_batch": rows, "task_to_env": task_to_env}
            at_own_pace = rollout.at_own_pace
            if barrier:
                rollout.at_own_pace = stages.roll_out
            try:
                return task_to_env.roll_out(RolloutCall(original, call, concurrently=True))
            finally:
                rollout.at_own_pace = at_own_pace

        return roll

    batches = iter(ahead)
    plain = TrainingMap(environments, given.config, clock)
    times.take("first", grpo, next(batches), counted=False)
    for _ in range(repeats):
        times.take("grpo", grpo, next(batches))
        times.take("barrier", two_stages(plain, barrier=True), next(batches))
        times.take("pipelined", two_stages(plain), next(batches))
    fused = TrainingMap(environments, given.config, clock)
    fused.prefetcher = Prefetcher(ahead, clock, total_steps)
    for number in range(repeats + 1):
        times.take("fused" if number else "fused first", two_stages(fused), next(batches))
        clock.finished += 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of each way (3)")
    parser.add_argument(
        "--limit", type=float, default=600, metavar="S", help="seconds behind the set-up (600)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="holds what was measured so far")
    parser.add_argument("overrides", nargs="+", metavar="OVERRIDE", help="as of igrpo train")
    flags = parser.parse_args(arguments)

    from igrpo_nemo.nemo import launch, processes

    config = load_config(flags.overrides)
    processes.prepare_environment(config)
    from igrpo_nemo.nemo import setup

    def trainer(
        config: Config, total_steps: int, loader: Any, made: dict[str, Any], **_: Any
    ) -> Callable[[], None]:
        """In place of NeMo-RL's."""

        def run() -> None:
            times = Times(flags.limit, flags.json, config.grpo.num_prompts_per_step)
            try:
                measure(config, total_steps, loader, made, times, flags.repeats)
            except OutOfTime:
                print(f"cut off after {flags.limit:g} s", flush=True)
            print(json.dumps(times.result()["ratios"]), flush=True)
            raise SystemExit(0)  # nothing was trained, which would be an error

        return run

    setup.trainer = trainer
    try:
        return launch.train(config)
    except SystemExit as ended:
        return int(ended.code or 0)


if __name__ == "__main__":
    sys.exit(main())

"""The demo's model and its benchmark: chained arithmetic that was held out of training."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from igrpo_nemo.chain.checkpoints import find_checkpoint
from igrpo_nemo.chain.script import run_to_its_end
from igrpo_nemo.config import Config
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.skills.benchmarks import benchmark_named
from igrpo_nemo.evaluation.skills.data import checked_rows, write_benchmark
from igrpo_nemo.run import config_of_model

BENCHMARK = "arithmetic"
SAMPLES = 4
PROBLEMS = 256
SHORT_STEPS = 20
"""Steps of the training that stands in for a demo nobody ran yet."""


@dataclass(frozen=True, slots=True)
class Demo:
    """A checkpoint of the demo, and the folder of its benchmark's data."""

    checkpoint: Path
    data: Path


def prepare_demo(runs: Path) -> Demo:
    """The last checkpoint of `runs/demo`, or of a short demo trained for it, and its data."""
    run = runs / "demo"
    if not any((run / "checkpoints").glob("step_*")):
        run = runs / "demo_short"
        _train(run)
    checkpoint = find_checkpoint(run, "last").folder
    data = run / "evaluation" / "data"
    write_arithmetic(config_of_model(checkpoint, []), data)
    return Demo(checkpoint, data)


def write_arithmetic(config: Config, folder: Path, limit: int = PROBLEMS) -> Path:
    """The first held-out problems of a run, as a benchmark in `folder`."""
    from igrpo_nemo.run.problems import validation_problems

    problems = validation_problems(config.replaced("grpo", max_val_samples=limit))
    rows = [{"id": p.id, "problem": p.question, "expected_answer": p.answer} for p in problems]
    benchmark = benchmark_named(BENCHMARK)
    return write_benchmark(folder, BENCHMARK, checked_rows(benchmark, rows, "data.validation"))


def _train(run: Path) -> None:
    """Trains the short demo; one that is finished already is left as it is."""
    print(f"training a short demo into {run} ({SHORT_STEPS} steps)", flush=True)
    words = ["experiment=demo", f"grpo.max_num_steps={SHORT_STEPS}", f"logger.log_dir={run}"]
    code = run_to_its_end([sys.executable, "-m", "igrpo_nemo", "train", *words])
    if code:
        raise UserError(f"the short demo ended with exit code {code}: see its messages above")

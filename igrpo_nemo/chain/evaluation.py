"""The evaluation stage of a chain: NeMo-Skills, or `igrpo evaluate` without it.

    Experiment --chain_evaluation--> SkillsEvaluation --evaluate_here--> results
               --evaluate_embedded--> results of the embedded engine's own evaluation

Its folder is one of the weights and of the setting: nothing made from others is ever found in it.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from igrpo_nemo.chain.experiment import Experiment
from igrpo_nemo.chain.script import DONE, NO, run_to_its_end
from igrpo_nemo.chain.training import IGRPO
from igrpo_nemo.config import Config
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.model import Model, opens_thinking
from igrpo_nemo.evaluation.results import read_results
from igrpo_nemo.evaluation.skills.data import (
    benchmark_named,
    checked_rows,
    default_data_folder,
    with_benchmarks,
    write_benchmark,
)
from igrpo_nemo.evaluation.skills.evaluate import (
    SkillsEvaluation,
    complete_here,
    is_complete,
    report,
    skills_evaluation,
    starting_small,
    starting_vllm,
)
from igrpo_nemo.evaluation.skills.program import SkillsEnvironment, find_environment

BENCHMARK = "arithmetic"
PROBLEMS = 256


def write_arithmetic(config: Config, folder: Path, limit: int = PROBLEMS) -> Path:
    """The first held-out problems of a run, as a benchmark in `folder`."""
    from igrpo_nemo.run.problems import validation_problems

    problems = validation_problems(config.replaced("grpo", max_val_samples=limit))
    rows = [{"id": p.id, "problem": p.question, "expected_answer": p.answer} for p in problems]
    rows = checked_rows(benchmark_named(BENCHMARK), rows, "data.validation")
    return write_benchmark(folder, BENCHMARK, rows)


def uses_skills(chain: Experiment, environ: Mapping[str, str]) -> bool:
    """Whether NeMo-Skills evaluates. `auto` takes it where it is found, and for the embedded engine
    `igrpo evaluate` elsewhere; which one it is, is said here and stands in the results."""
    if chain.evaluator != "auto":
        return chain.evaluator == "nemo_skills"
    try:
        find_environment(environ)
    except UserError as error:
        if chain.config.igrpo.engine != "local":
            raise
        print(f"evaluate: with igrpo evaluate, not NeMo-Skills ({error})")
        return False
    return True


def _on_own_problems(chain: Experiment) -> bool:
    """Whether the benchmark is the run's held-out problems: the built-in model knows no other."""
    return chain.benchmarks is None and chain.config.igrpo.model is not None


def evaluated_config(chain: Experiment) -> Config:
    """The config with the benchmarks that are evaluated: the run's own problems, or its keys'."""
    config = chain.config
    if not _on_own_problems(chain):
        return with_benchmarks(config, chain.benchmarks)
    keys = config.igrpo.evaluation.model_copy(update={"benchmarks": {BENCHMARK: chain.samples}})
    return config.replaced("igrpo", evaluation=keys)


def chain_evaluation(
    chain: Experiment, environment: SkillsEnvironment, *, hf_home: str | None = None
) -> SkillsEvaluation:
    """The evaluation of a chain's model, which need not exist yet. `hf_home` has the model that
    training starts from (default: the config's, or this shell's).

    Raises `UserError` for data that is not prepared.
    """
    config = evaluated_config(chain)
    data_dir = chain.data_dir or default_data_folder(os.environ)
    if chain.data_dir is None and _on_own_problems(chain):
        data_dir = chain.run / "evaluation" / "data"
        write_arithmetic(config, data_dir, _limit(config))
    # As the training's tokenizer does, which the trained model gets.
    opened = opens_thinking(config.policy.tokenizer.name, config, hf_home=hf_home)
    return skills_evaluation(
        config,
        Model(str(chain.model.absolute()), chain.weights(), _context(chain), opened),
        data_dir,
        environment,
        base=chain.evaluations,
        address=chain.address,
        server_args=chain.server_args,
    )


def evaluate_here(chain: Experiment, environ: Mapping[str, str]) -> tuple[int, Path]:
    """Evaluates on this machine what is missing; the exit code and the folder of the results."""
    environment = find_environment(environ)
    evaluation = chain_evaluation(chain, environment)
    out = evaluation.out
    print(f"evaluate: NeMo-Skills {environment.version}, into {out}", flush=True)
    if not is_complete(evaluation):
        serving = None
        if chain.address is None and chain.config.igrpo.engine == "local":
            serving = starting_small(chain.config, chain.model)
        elif chain.address is None:
            serving = starting_vllm(evaluation, environ)
        complete_here(evaluation, environ, serving=serving)
    return (DONE if report(out, evaluation.names) else NO), out


def evaluate_embedded(chain: Experiment) -> tuple[int, Path]:
    """`igrpo evaluate` on the run's held-out problems; the exit code and the folder."""
    command, out = embedded_command(chain)
    try:
        found = read_results(out).benchmarks.values()
        complete = all(one.num_samples == chain.samples for one in found)
    except UserError:
        complete = False  # `igrpo evaluate` completes it, or says why it cannot
    if complete:
        print(f"evaluate: {out} is complete")
        return DONE, out
    print(f"evaluate: {shlex.join(command)}", flush=True)
    return run_to_its_end([*IGRPO, *command[1:]]), out


def embedded_command(chain: Experiment) -> tuple[list[str], Path]:
    """The command of `evaluate_embedded` and where its results will be."""
    keys, limit = chain.config.igrpo.evaluation, _limit(chain.config)
    setting = f"t{keys.temperature:g}-p{keys.top_p:g}-n{limit}"
    out = chain.evaluations / f"igrpo-{chain.weights()[-8:]}-{setting}"
    flags = {
        "--model": chain.model,
        "--samples": chain.samples,
        "--temperature": keys.temperature,
        "--top-p": keys.top_p,
        "--limit": limit,
        "--out": out,
    }
    words = [word for name, value in flags.items() for word in (name, str(value))]
    return ["igrpo", "evaluate", *words], out


def _limit(config: Config) -> int:
    return min(PROBLEMS, config.grpo.max_val_samples or PROBLEMS)


def _context(chain: Experiment) -> int | None:
    """The model's context, the same before and after it is trained: of its architecture, else of
    the model that training starts from."""
    if architecture := chain.config.igrpo.architecture:
        return architecture.max_position_embeddings
    for folder in (Path(chain.config.policy.model_name), chain.model):
        if (file := folder / "config.json").is_file():
            return json.loads(file.read_text(encoding="utf-8")).get("max_position_embeddings")
    return None

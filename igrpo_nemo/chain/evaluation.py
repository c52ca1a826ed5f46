"""The evaluation stage of a chain: NeMo-Skills here or on Slurm, or `igrpo evaluate` without it.

    Chain --skills_evaluation--> Evaluation --evaluate_here--> results
                                            --submit_evaluation--> job ids, results later
          --evaluate_embedded--> results of the embedded engine's own evaluation

Its folder is one of the weights and of the setting: nothing made from others is ever found in it.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from igrpo_nemo.chain.checkpoints import find_checkpoint
from igrpo_nemo.chain.experiment import Chain
from igrpo_nemo.chain.script import DONE, NO, run_to_its_end
from igrpo_nemo.chain.training import IGRPO
from igrpo_nemo.config import Config
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.model import Model, opens_thinking
from igrpo_nemo.evaluation.results import RESULTS_FOLDER, read_results
from igrpo_nemo.evaluation.setting import check_same, default_folder, setting_of
from igrpo_nemo.evaluation.skills.benchmarks import benchmark_named, with_benchmarks
from igrpo_nemo.evaluation.skills.command import Server, tensor_parallel
from igrpo_nemo.evaluation.skills.data import checked_rows, read_benchmark, write_benchmark
from igrpo_nemo.evaluation.skills.environment import SkillsEnvironment, find_environment
from igrpo_nemo.evaluation.skills.evaluate import (
    SkillsEvaluation,
    complete_here,
    lacking_of,
    missing_text,
    with_vllm,
)
from igrpo_nemo.evaluation.skills.vllm_server import find_vllm
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


SERVER_TYPE = "vllm"
"""NeMo-Skills' name for any server of this kind; its "openai" changes the sampling."""


@dataclass(frozen=True, slots=True)
class Choices:
    """What the command line says about the evaluation. `address`: an OpenAI-compatible server
    that serves the model; without one a small model is served here, a large one by the jobs."""

    evaluator: str = "auto"
    benchmarks: str | None = None
    """NAME[:K],... in the place of those of the config."""
    data_dir: Path | None = None
    address: str | None = None
    server_args: str = ""
    samples: int = SAMPLES
    """Samples a problem where the benchmark is the run's own held-out problems."""


def uses_skills(chain: Chain, choices: Choices, environ: Mapping[str, str]) -> bool:
    """Whether NeMo-Skills evaluates. `auto` takes it where it is found, and for the embedded engine
    `igrpo evaluate` elsewhere; which one it is, is said here and stands in the results."""
    if choices.evaluator != "auto":
        return choices.evaluator == "nemo_skills"
    try:
        find_environment(environ)
    except UserError as error:
        if chain.config.igrpo.engine != "local":
            raise
        print(f"evaluate: with igrpo evaluate, not NeMo-Skills ({error})")
        return False
    return True


def on_own_problems(config: Config) -> bool:
    """Whether the benchmark is the run's held-out problems: the built-in model knows no other."""
    return config.igrpo.model is not None


def evaluated_config(chain: Chain, choices: Choices) -> Config:
    """The config with the benchmarks that are evaluated: the run's own problems, or its keys'."""
    config = chain.config
    if choices.benchmarks is not None or not on_own_problems(config):
        return with_benchmarks(config, choices.benchmarks)
    keys = config.igrpo.evaluation.model_copy(update={"benchmarks": {BENCHMARK: choices.samples}})
    return config.replaced("igrpo", evaluation=keys)


def skills_evaluation(
    chain: Chain,
    choices: Choices,
    environment: SkillsEnvironment,
    *,
    hf_home: str | None = None,
) -> SkillsEvaluation:
    """The evaluation of a chain's model, which need not exist yet. `hf_home` has the model that
    training starts from (default: the config's, or this shell's).

    Raises `UserError` for data that is not prepared.
    """
    config = evaluated_config(chain, choices)
    names = config.igrpo.evaluation.benchmarks
    folder = _data_folder(chain, choices)
    data = tuple(read_benchmark(folder, name) for name in names)
    architecture = config.igrpo.architecture
    heads = architecture.num_attention_heads if architecture else None
    opened = _opens_thinking(config, hf_home or config.igrpo.site.hf_home)
    model = Model(str(chain.model.absolute()), chain.weights(), _context(chain), opened)
    setting = setting_of(
        config, model, data, server_type=SERVER_TYPE, nemo_skills=environment.version
    )
    server = Server(
        model=model.name,
        server_type=SERVER_TYPE,
        address=choices.address,
        gpus=tensor_parallel(config.igrpo.evaluation.server_gpus, heads),
        arguments=choices.server_args,
    )
    out = default_folder(chain.evaluations, setting)
    return SkillsEvaluation(config, setting, data, server, out, environment)


def evaluate_here(chain: Chain, choices: Choices, environ: Mapping[str, str]) -> tuple[int, Path]:
    """Evaluates on this machine what is missing; the exit code and the folder of the results."""
    environment = find_environment(environ)
    evaluation = skills_evaluation(chain, choices, environment)
    print(f"evaluate: NeMo-Skills {environment.version}, into {evaluation.out}", flush=True)
    check_same(evaluation.out, evaluation.setting)
    if not lacking_of(evaluation):
        return DONE, evaluation.out
    with ExitStack() as stack:
        serving = None
        if _serves(chain, choices):
            evaluation = replace(evaluation, server=_served(stack, chain, evaluation))
        elif choices.address is None:
            if (vllm := find_vllm(environ)) is None:
                raise UserError(
                    f"nothing serves {chain.model}, and no vllm is on PATH (or named by VLLM): "
                    "give the --address of a server, or --cluster slurm"
                )
            serving = with_vllm(vllm, evaluation, environ)
        lacking = complete_here(evaluation, environ, serving=serving)
    if lacking:
        print(missing_text(evaluation.out, lacking), file=sys.stderr)
    return (NO if lacking else DONE), evaluation.out


def evaluate_embedded(chain: Chain, choices: Choices) -> tuple[int, Path]:
    """`igrpo evaluate` on the run's held-out problems; the exit code and the folder."""
    command, out = embedded_command(chain, choices)
    if _is_complete(out, choices.samples):
        print(f"evaluate: {out} is complete")
        return DONE, out
    print(f"evaluate: {shlex.join(command)}", flush=True)
    return run_to_its_end([*IGRPO, *command[1:]]), out


def embedded_command(chain: Chain, choices: Choices) -> tuple[list[str], Path]:
    """The command of `evaluate_embedded` and where its results will be."""
    keys, limit = chain.config.igrpo.evaluation, _limit(chain.config)
    setting = f"t{keys.temperature:g}-p{keys.top_p:g}-n{limit}"
    out = chain.evaluations / f"igrpo-{chain.weights()[-8:]}-{setting}"
    flags = {
        "--model": chain.model,
        "--samples": choices.samples,
        "--temperature": keys.temperature,
        "--top-p": keys.top_p,
        "--limit": limit,
        "--out": out,
    }
    words = [word for name, value in flags.items() for word in (name, str(value))]
    return ["igrpo", "evaluate", *words], out


def _is_complete(out: Path, samples: int) -> bool:
    if not (out / RESULTS_FOLDER).is_dir():
        return False
    try:
        found = read_results(out).benchmarks.values()
    except UserError:
        return False  # `igrpo evaluate` completes it, or says why it cannot
    return all(one.num_samples == samples for one in found)


def _serves(chain: Chain, choices: Choices) -> bool:
    return choices.address is None and chain.config.igrpo.engine == "local"


def _served(stack: ExitStack, chain: Chain, evaluation: SkillsEvaluation) -> Server:
    from igrpo_nemo.evaluation.skills.serve import serving
    from igrpo_nemo.run import set_threads

    set_threads(chain.config.igrpo.threads)
    folder = chain.model.resolve()
    policy = chain.config.policy
    template = policy.tokenizer.chat_template
    address = stack.enter_context(
        serving(folder, precision=policy.precision, chat_template=template)
    )
    return replace(evaluation.server, model=str(folder), address=address)


def _data_folder(chain: Chain, choices: Choices) -> Path:
    own = choices.benchmarks is None and on_own_problems(chain.config)
    if choices.data_dir is None and own:
        folder = chain.run / "evaluation" / "data"
        write_arithmetic(chain.config, folder, _limit(chain.config))
        return folder
    return choices.data_dir or Path(os.environ.get("NEMO_SKILLS_DATA_DIR") or "data/eval")


def _limit(config: Config) -> int:
    return min(PROBLEMS, config.grpo.max_val_samples or PROBLEMS)


def _opens_thinking(config: Config, hf_home: str | None) -> bool:
    """As the training's tokenizer does, which the trained model gets: known before it exists."""
    name, template = config.policy.tokenizer.name, config.policy.tokenizer.chat_template
    return opens_thinking(name, config.igrpo.prompt.system, template, hf_home=hf_home)


def _context(chain: Chain) -> int | None:
    """The model's context, the same before and after it is trained: of its architecture, else of
    the model that training starts from."""
    if architecture := chain.config.igrpo.architecture:
        return architecture.max_position_embeddings
    for folder in (Path(chain.config.policy.model_name), chain.model):
        if (file := folder / "config.json").is_file():
            return json.loads(file.read_text(encoding="utf-8")).get("max_position_embeddings")
    return None

"""The last two stages of a chain, here and on Slurm: the evaluation and the comparison.

NeMo-Skills evaluates, or `igrpo evaluate` without it, in a folder of the weights and the setting:
nothing made from others is ever found in it. The comparison is Markdown, CSV and HTML.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from igrpo_nemo.chain.experiment import Experiment
from igrpo_nemo.config import Config
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.model import (
    Model,
    cached_folder,
    facts,
    opens_thinking,
    shape,
)
from igrpo_nemo.evaluation.results import REFINED
from igrpo_nemo.evaluation.skills.data import (
    Benchmark,
    checked_rows,
    default_data_folder,
    read_benchmark,
    with_benchmarks,
    write_benchmark,
)
from igrpo_nemo.evaluation.skills.evaluate import SkillsEvaluation, skills_evaluation
from igrpo_nemo.evaluation.skills.program import SkillsEnvironment, find_environment
from igrpo_nemo.evaluation.systems import (
    Published,
    System,
    compared,
    is_published,
    load_systems,
    published_results,
)
from igrpo_nemo.evaluation.tables import as_csv, as_markdown, summary
from igrpo_nemo.files.atomic import write_or_refuse
from igrpo_nemo.report.page import render, write_page

BENCHMARK = "arithmetic"
PROBLEMS = 256
CONFIG = "config.json"


def skills_of(chain: Experiment, environ: Mapping[str, str]) -> SkillsEnvironment | None:
    """The NeMo-Skills that evaluates, None for `igrpo evaluate`. `auto` takes it where it is found,
    and for the embedded engine `igrpo evaluate` elsewhere; which one it is, is said here and stands
    in the results. Raises `UserError` where there is none and nothing else can evaluate."""
    if chain.evaluator == "igrpo":
        return None
    try:
        return find_environment(environ)
    except UserError as error:
        if chain.evaluator == "nemo_skills" or chain.config.igrpo.engine != "local":
            raise
        print(f"evaluate: with igrpo evaluate, not NeMo-Skills ({error})")
        return None


def _on_own_problems(chain: Experiment) -> bool:
    """Whether the benchmark is the run's held-out problems: the built-in model knows no other."""
    return chain.benchmarks is None and chain.config.igrpo.model is not None


def evaluated(chain: Experiment) -> Config:
    """The config with the benchmarks that are evaluated: the run's own problems, or its keys'."""
    own = _on_own_problems(chain)
    return with_benchmarks(
        chain.config, f"{BENCHMARK}:{chain.samples}" if own else chain.benchmarks
    )


def check_evaluation(chain: Experiment, with_skills: bool) -> None:
    """Raises `UserError`, before anything is trained, for data that is not prepared, and where
    there are fewer samples than drafts."""
    own = not with_skills or _on_own_problems(chain)
    counts = evaluated(chain).igrpo.evaluation.benchmarks
    for name, samples in ({"a run's own problems": chain.samples} if own else counts).items():
        if chain.refinement is not None:
            chain.refinement.check(samples, name)
        if not own:
            read_benchmark(_data_folder(chain), name)


def _data_folder(chain: Experiment) -> Path:
    return chain.data_dir or default_data_folder(os.environ)


def chain_evaluation(
    chain: Experiment, environment: SkillsEnvironment, *, hf_home: str | None = None
) -> SkillsEvaluation:
    """The evaluation of a chain's model, which need not exist yet. `hf_home` has the model that
    training starts from (default: the config's, or this shell's).

    Raises `UserError` for data that is not prepared.
    """
    config = evaluated(chain)
    data_dir = _data_folder(chain)
    if chain.data_dir is None and _on_own_problems(chain):
        data_dir = chain.run / "evaluation" / "data"
        _write_own_problems(config, data_dir)
    # As the training's tokenizer does, which the trained model gets.
    opened = opens_thinking(config.policy.tokenizer.name, config, hf_home=hf_home)
    known = facts(_shape(chain, hf_home), config)
    return skills_evaluation(
        config,
        Model(str(chain.model.absolute()), chain.weights(), thinking_open=opened, **known),
        data_dir,
        environment,
        base=chain.evaluations,
        address=chain.address,
        server_args=chain.server_args,
        refinement=chain.refinement,
    )


def _write_own_problems(config: Config, folder: Path) -> None:
    from igrpo_nemo.run.problems import validation_problems

    problems = validation_problems(config.replaced("grpo", max_val_samples=_limit(config)))
    rows = [{"id": p.id, "problem": p.question, "expected_answer": p.answer} for p in problems]
    rows = checked_rows(Benchmark(BENCHMARK), rows, "data.validation")
    write_benchmark(folder, BENCHMARK, rows)


def embedded_command(chain: Experiment) -> tuple[list[str], Path]:
    """The command `igrpo evaluate` of a chain's model, and where its results will be."""
    keys, limit = chain.config.igrpo.evaluation, _limit(chain.config)
    setting = f"t{keys.temperature:g}-p{keys.top_p:g}-n{limit}"
    out = chain.evaluations / f"igrpo-{chain.weights()[-8:]}-{setting}"
    command = ["igrpo", "evaluate", "--model", str(chain.model), "--samples", str(chain.samples)]
    command += ["--temperature", str(keys.temperature), "--top-p", str(keys.top_p)]
    if chain.refine is not None:
        command += ["--refine", str(chain.refine), "--choose", chain.choose]
    return [*command, "--limit", str(limit), "--out", str(out)], out


def _limit(config: Config) -> int:
    return min(PROBLEMS, config.grpo.max_val_samples or PROBLEMS)


def _shape(chain: Experiment, hf_home: str | None) -> dict[str, Any]:
    """The model's config, the same before and after it is trained: the one that training starts
    from; empty where `igrpo.architecture` says it. Raises `UserError` where neither is here."""
    config = chain.config
    if config.igrpo.architecture is not None:
        return {}
    base = cached_folder(config.policy.model_name, hf_home or config.igrpo.site.hf_home, CONFIG)
    for folder in (base, chain.model):
        if folder is not None and (values := shape(folder)) is not None:
            return values
    raise UserError(
        f"the context of {config.policy.model_name} is not known on this machine: "
        f"`hf download {config.policy.model_name} {CONFIG}` puts it into HF_HOME"
    )


COMPARISON_FILES = ("comparison.md", "comparison.csv", "report.html")


def compare(
    names: Sequence[str], out: Path, *, experiments: Sequence[str] = (), anyway: bool = False
) -> str:
    """Compares, writes `COMPARISON_FILES` into `out`, and returns what a terminal shows.

    `names`: `[LABEL=]FOLDER`, the first one being the reference; `experiments`: `[LABEL=]NAME` of
    published rows, without a label beside the last system. Raises `UserError` for what cannot be
    compared.
    """
    systems = load_systems(names)
    comparison = compared(systems, anyway=anyway, published=_published(experiments, systems))
    write_or_refuse(out / COMPARISON_FILES[0], as_markdown(comparison))
    write_or_refuse(out / COMPARISON_FILES[1], as_csv(comparison))
    write_page(out / COMPARISON_FILES[2], render([], evaluation=comparison))
    return "\n".join([summary(comparison), "", *(str(out / name) for name in COMPARISON_FILES)])


def compare_chain(chain: Experiment, folder: Path) -> str:
    """Compares a chain's own evaluation in `folder` with the others; what a terminal shows."""
    systems, experiments = compared_names(chain, folder / REFINED if chain.refine else folder)
    return compare(systems, chain.comparison, experiments=experiments, anyway=chain.anyway)


def compared_names(chain: Experiment, folder: Path) -> tuple[list[str], list[str]]:
    """The systems of a chain's comparison, its own evaluation in `folder` being the last one, and
    its published figures. Refined answers stand behind their bare ones."""
    published = [f"{chain.label}={chain.name}"] if is_published(chain.name) else []
    own = [f"{chain.label}={folder}"]
    if folder.name == REFINED:
        own = [f"{chain.label}={folder.parent}", f"{chain.label} {REFINED}={folder}"]
    return [*chain.against, *own], published


def _published(names: Sequence[str], systems: Sequence[System]) -> dict[str, Published]:
    labels = [system.label for system in systems]
    found = {}
    for name in names:
        label, equals, experiment = name.partition("=")
        if not equals:
            label, experiment = labels[-1], name
        if label not in labels:
            raise UserError(f"--experiment {name}: {label} is none of {', '.join(labels)}")
        found[label] = published_results(experiment)
    return found

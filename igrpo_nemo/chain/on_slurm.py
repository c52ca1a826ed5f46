"""A chain on Slurm: every stage is submitted at once, each behind the success of the one before.

    igrpo launch (afterok and singleton among continuation jobs)
      --afterok--> RUN/stages/convert.sh --afterok--> NeMo-Skills' jobs
      --afterok--> RUN/stages/compare.sh

Stages that are done are left out. Everything that can be checked is checked before the first job
is submitted. The plan walks the same stages and prints exactly what would be.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from igrpo_nemo.chain.comparison import Request, compare, summary_text
from igrpo_nemo.chain.conversion import check_convertible, is_converted
from igrpo_nemo.chain.evaluation import Choices, chain_evaluation, evaluated_config
from igrpo_nemo.chain.experiment import Chain, training_inputs
from igrpo_nemo.chain.here import with_chain
from igrpo_nemo.chain.training import is_trained, submit_training, training_plan
from igrpo_nemo.cluster.settings import job_settings
from igrpo_nemo.cluster.site import site_profile
from igrpo_nemo.cluster.stage import (
    StageJob,
    Surroundings,
    run_folders,
    script_path,
    script_text,
    submit_stage,
)
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.skills.cluster_profile import (
    ClusterProfile,
    profile_for,
    sbatch_options,
)
from igrpo_nemo.evaluation.skills.command import Place
from igrpo_nemo.evaluation.skills.evaluate import SkillsEvaluation, is_complete
from igrpo_nemo.evaluation.skills.program import find_environment
from igrpo_nemo.evaluation.skills.submit import evaluation_text, submit

CONVERT_TIME = "04:00:00"
COMPARE_TIME = "01:00:00"

Jobs = Sequence[int | str]
"""Numbers of jobs that Slurm gave, or names that stand for them in a plan."""


@dataclass(frozen=True, slots=True)
class SlurmChoices:
    """What the command line says about Slurm. `continuations`: jobs of the training; a single one
    requeues itself. `jobs`: among how many the samples of an evaluation are shared."""

    checkout: Path
    continuations: int = 1
    skills_profile: str | None = None
    config_dir: Path | None = None
    jobs: int = 8


class Stages(Protocol):
    """What is done with each stage; the jobs that the next one waits for."""

    def done(self, stage: str, text: str) -> None: ...

    def train(self, chain: Chain, slurm: SlurmChoices) -> Jobs: ...

    def stage(self, job: StageJob) -> Jobs: ...


@dataclass(frozen=True, slots=True)
class Composed:
    """The evaluation before anything is submitted: nothing of it can fail any more."""

    profile: ClusterProfile
    evaluation: SkillsEvaluation
    place: Place


def submit_all(
    chain: Chain,
    choices: Choices,
    request: Request,
    slurm: SlurmChoices,
    environ: Mapping[str, str],
) -> int:
    """Submits what is not done yet; 0. Raises `UserError` naming what was submitted before that."""
    where = _surroundings(chain, choices, slurm, environ)
    composed = _composed(chain, choices, slurm, where, environ, chain.run / "stages")
    evaluation, place = composed.evaluation, composed.place
    if _is_evaluated(chain, evaluation):
        comparison = compare(with_chain(request, chain, str(evaluation.out)), chain.comparison)
        print(summary_text(comparison, chain.comparison))
        return 0
    composed.profile.check_own()
    # NeMo-Skills checks every argument while nothing is submitted yet.
    submit(evaluation, place, environ, dry_run=True)
    stages = Submission(where, environ)
    try:
        _walk(chain, request, slurm, stages, evaluation.out, stages.evaluating(evaluation, place))
    except UserError as error:
        ids = " ".join(map(str, stages.sent))
        told = f"; submitted before that: {ids} (scancel {ids} takes them back)" if ids else ""
        raise UserError(f"{error}{told}") from error
    print(f"the tables of the comparison will be in {chain.comparison}")
    print("the same command later checks what is done and submits what is missing")
    return 0


def slurm_plan(
    chain: Chain,
    choices: Choices,
    request: Request,
    slurm: SlurmChoices,
    environ: Mapping[str, str],
) -> str:
    """Every job that `submit_all` would submit, with its batch file; TRAIN and the like stand for
    numbers that Slurm gives. Where NeMo-Skills or its data is missing, its part says so."""
    where = _surroundings(chain, choices, slurm, environ)
    plan, out = Plan(where, environ), chain.run
    with tempfile.TemporaryDirectory() as scratch:
        try:
            composed = _composed(chain, choices, slurm, where, environ, Path(scratch))
        except UserError as error:
            keys = evaluated_config(chain, choices).igrpo.evaluation.model_dump()
            setting = "\n".join(f"# {name}: {value}" for name, value in keys.items())
            evaluate = plan.showing("evaluate", f"# not composed: {error}\n{setting}")
        else:
            out = composed.evaluation.out
            evaluate = plan.evaluating(chain, composed)
        _walk(chain, request, slurm, plan, out, evaluate)
    return "\n".join(plan.parts)


def _walk(
    chain: Chain,
    request: Request,
    slurm: SlurmChoices,
    stages: Stages,
    out: Path,
    evaluate: Callable[[Jobs], Jobs],
) -> None:
    """Train, convert, evaluate into `out`, compare: what is not done, behind what comes before."""
    after: Jobs = ()
    if is_trained(chain.config):
        stages.done("train", f"{chain.run} is finished")
    else:
        after = stages.train(chain, slurm)
    if _is_converted(chain):
        stages.done("convert", f"{chain.model} is there")
    else:
        after = stages.stage(convert_job(chain, after))
    after = evaluate(after) or after
    stages.stage(compare_job(chain, request, out, after))


@dataclass(slots=True)
class Submission:
    """Submits each stage. `sent` are the jobs so far."""

    where: Surroundings
    environ: Mapping[str, str]
    sent: list[int] = field(default_factory=list)

    def done(self, stage: str, text: str) -> None:
        print(f"{stage}: {text}", flush=True)

    def train(self, chain: Chain, slurm: SlurmChoices) -> Jobs:
        jobs = slurm.continuations
        self.sent += submit_training(chain.config, chain.words, jobs, slurm.checkout, self.environ)
        return self.sent[-1:]

    def stage(self, job: StageJob) -> Jobs:
        self.sent.append(submit_stage(job, self.where, self.environ))
        print(f"{job.stage}: job {self.sent[-1]}", flush=True)
        return self.sent[-1:]

    def evaluating(self, evaluation: SkillsEvaluation, place: Place) -> Callable[[Jobs], Jobs]:
        """What sends the missing samples; no job where mending the files made them complete."""

        def evaluate(after: Jobs) -> Jobs:
            jobs = submit(evaluation, replace(place, after=tuple(after)), self.environ)
            if jobs is None:
                self.done("evaluate", f"{evaluation.out} is complete")
                return ()
            if not jobs:
                raise UserError(
                    "NeMo-Skills named no job that it submitted: see the newest log in "
                    f"{evaluation.out}"
                )
            self.sent += jobs
            self.done("evaluate", f"jobs {' '.join(map(str, jobs))}, into {evaluation.out}")
            return jobs

        return evaluate


@dataclass(slots=True)
class Plan:
    """Collects the text of each stage."""

    where: Surroundings
    environ: Mapping[str, str]
    parts: list[str] = field(default_factory=list)

    def _add(self, stage: str, text: str) -> Jobs:
        self.parts.append(f"##### {stage}\n{text.rstrip()}\n")
        return (stage.upper(),)

    def done(self, stage: str, text: str) -> None:
        self._add(stage, f"# {text}")

    def train(self, chain: Chain, slurm: SlurmChoices) -> Jobs:
        text = training_plan(chain.words, slurm.continuations, slurm.checkout, self.environ)
        return self._add("train", f"# TRAIN is the last of these jobs\n{text}")

    def stage(self, job: StageJob) -> Jobs:
        path, checkout = script_path(job, self.where), self.where.checkout
        path = path.relative_to(checkout) if path.is_relative_to(checkout) else path
        text = script_text(job, self.where)
        return self._add(job.stage, f"# sbatch --parsable {path}\n{text}")

    def showing(self, stage: str, text: str) -> Callable[[Jobs], Jobs]:
        return lambda after: self._add(stage, text)

    def evaluating(self, chain: Chain, composed: Composed) -> Callable[[Jobs], Jobs]:
        """What shows NeMo-Skills' jobs, or that none is needed."""
        evaluation = composed.evaluation
        if _is_evaluated(chain, evaluation):
            return self.showing("evaluate", f"# {evaluation.out} is complete")
        warning = ""
        try:
            composed.profile.check_own()
        except UserError as error:
            warning = f"# not to be submitted as it is: {error}\n"

        def evaluate(after: Jobs) -> Jobs:
            place = replace(composed.place, after=tuple(after), config_dir=chain.run / "stages")
            read_from = composed.profile.config_dir
            text = evaluation_text(evaluation, place, self.environ, read_from)
            return self._add("evaluate", warning + text)

        return evaluate


def convert_job(chain: Chain, after: Jobs) -> StageJob:
    """The conversion, behind the last of the training's jobs."""
    command = ("python", "pipelines/convert.py", "--checkpoint", chain.which, *chain.words)
    return StageJob("convert", command, gpus=1, time=CONVERT_TIME, after=tuple(after))


def compare_job(chain: Chain, request: Request, evaluation: Path, after: Jobs) -> StageJob:
    """The comparison, behind all of the evaluation's jobs."""
    whole = with_chain(request, chain, str(evaluation))
    flags = [word for name in whole.experiments for word in ("--experiment", name)]
    flags += ["--anyway"] if whole.anyway else []
    command = ("python", "pipelines/compare.py", "--out", str(chain.comparison), *flags)
    return StageJob("compare", (*command, *map(str, whole.systems)), 0, COMPARE_TIME, tuple(after))


def _surroundings(
    chain: Chain, choices: Choices, slurm: SlurmChoices, environ: Mapping[str, str]
) -> Surroundings:
    """Where the stages run. Raises `UserError` for what cannot run there."""
    if choices.evaluator == "igrpo":
        raise UserError("--evaluator igrpo evaluates here: leave out --cluster")
    check_convertible(chain.config)
    is_trained(chain.config)
    site = site_profile(chain.config, slurm.checkout, environ, chain.words)
    config = chain.config.replaced("igrpo", site=site)
    settings = job_settings(config, site, slurm.checkout, environ)
    where = Surroundings(site, slurm.checkout, chain.run, settings)
    script_text(convert_job(chain, ()), where)  # both stages' have the same options
    return where


def _composed(
    chain: Chain,
    choices: Choices,
    slurm: SlurmChoices,
    where: Surroundings,
    environ: Mapping[str, str],
    folder: Path,
) -> Composed:
    """The evaluation and where it runs; the chain's NeMo-Skills profile is put into `folder`."""
    site = where.site
    environment = find_environment(environ)
    evaluation = chain_evaluation(chain, choices, environment, hf_home=site.hf_home)
    name = slurm.skills_profile or f"slurm_{site.gpu.partition('_')[0]}"
    config_dir = slurm.config_dir or slurm.checkout / "configs" / "cluster_configs"
    profile = profile_for(site, name, config_dir, run_folders(where), folder)
    place = profile.place(evaluation.out, jobs=slurm.jobs, sbatch=sbatch_options(site))
    server = replace(evaluation.server, model=profile.seen(evaluation.server.model))
    return Composed(profile, replace(evaluation, server=server), place)


def _is_converted(chain: Chain) -> bool:
    return is_converted(chain.run, chain.which, training_inputs(chain.config))


def _is_evaluated(chain: Chain, evaluation: SkillsEvaluation) -> bool:
    """Whether the evaluation is complete, and of weights that are there.

    Raises `UserError` where its folder holds samples of other data.
    """
    return is_complete(evaluation) and _is_converted(chain)

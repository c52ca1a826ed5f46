"""A chain on Slurm: every stage is submitted at once, each behind the success of the one before.

    igrpo launch (afterok and singleton among continuation jobs)
      --afterok--> RUN/stages/convert.sh --afterok--> NeMo-Skills' jobs
      --afterok--> RUN/stages/compare.sh

Stages that are done are left out. Everything that can be checked is checked before the first job
is submitted. The plan walks the same stages and prints exactly what would be.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from igrpo_nemo.chain.comparison import compare_chain, request_of
from igrpo_nemo.chain.conversion import check_convertible, is_converted
from igrpo_nemo.chain.evaluation import chain_evaluation, evaluated_config
from igrpo_nemo.chain.experiment import Experiment, training_inputs
from igrpo_nemo.chain.training import is_trained, submit_training, training_plan
from igrpo_nemo.cluster.settings import job_settings
from igrpo_nemo.cluster.site import with_site
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


def submit_all(chain: Experiment, environ: Mapping[str, str]) -> int:
    """Submits what is not done yet; 0. Raises `UserError` naming what was submitted before that."""
    where = _surroundings(chain, environ)
    composed = _composed(chain, where, environ, chain.run / "stages")
    evaluation = composed.evaluation
    if _is_evaluated(chain, evaluation):
        print(compare_chain(chain, evaluation.out))
        return 0
    composed.profile.check_own()
    # NeMo-Skills checks every argument while nothing is submitted yet.
    submit(evaluation, composed.place, environ, dry_run=True)
    stages = SendStages(chain, where, environ, composed)
    try:
        _walk(stages, evaluation.out)
    except UserError as error:
        ids = " ".join(map(str, stages.sent))
        told = f"; submitted before that: {ids} (scancel {ids} takes them back)" if ids else ""
        raise UserError(f"{error}{told}") from error
    print(f"the tables of the comparison will be in {chain.comparison}")
    print("the same command later checks what is done and submits what is missing")
    return 0


def slurm_plan(chain: Experiment, environ: Mapping[str, str]) -> str:
    """Every job that `submit_all` would submit, with its batch file; TRAIN and the like stand for
    numbers that Slurm gives. Where NeMo-Skills or its data is missing, its part says so."""
    where = _surroundings(chain, environ)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            composed = _composed(chain, where, environ, Path(scratch))
        except UserError as error:
            composed = error
        plan = ShowStages(chain, where, environ, composed)
        out = chain.run if isinstance(composed, UserError) else composed.evaluation.out
        _walk(plan, out)
    return "\n".join(plan.parts)


def _walk(stages: SendStages | ShowStages, out: Path) -> None:
    """Train, convert, evaluate into `out`, compare: what is not done, behind what comes before."""
    chain = stages.chain
    after: Jobs = ()
    if is_trained(chain.config):
        stages.done("train", f"{chain.run} is finished")
    else:
        after = stages.train()
    if _is_converted(chain):
        stages.done("convert", f"{chain.model} is there")
    else:
        after = stages.stage(convert_job(chain, after))
    after = stages.evaluate(after) or after
    stages.stage(compare_job(chain, out, after))


@dataclass(frozen=True, slots=True)
class Composed:
    """The evaluation before anything is submitted: nothing of it can fail any more."""

    profile: ClusterProfile
    evaluation: SkillsEvaluation
    place: Place


@dataclass(slots=True)
class SendStages:
    """Submits each stage, and gives the jobs that the next one waits for. `sent`: all so far."""

    chain: Experiment
    where: Surroundings
    environ: Mapping[str, str]
    composed: Composed
    sent: list[int] = field(default_factory=list)

    def done(self, stage: str, text: str) -> None:
        print(f"{stage}: {text}", flush=True)

    def train(self) -> Jobs:
        config, jobs, checkout = self.chain.config, self.chain.continuations, self.chain.checkout
        self.sent += submit_training(config, self.chain.words, jobs, checkout, self.environ)
        return self.sent[-1:]

    def stage(self, job: StageJob) -> Jobs:
        self.sent.append(submit_stage(job, self.where, self.environ))
        self.done(job.stage, f"job {self.sent[-1]}")
        return self.sent[-1:]

    def evaluate(self, after: Jobs) -> Jobs:
        """The jobs of what is missing; none where mending the files made it complete."""
        evaluation, place = self.composed.evaluation, self.composed.place
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


@dataclass(slots=True)
class ShowStages:
    """Collects the text of each stage. `composed` may be the reason why it could not be."""

    chain: Experiment
    where: Surroundings
    environ: Mapping[str, str]
    composed: Composed | UserError
    parts: list[str] = field(default_factory=list)

    def done(self, stage: str, text: str) -> Jobs:
        self.parts.append(f"##### {stage}\n# {text.rstrip()}\n")
        return (stage.upper(),)

    def train(self) -> Jobs:
        jobs, checkout = self.chain.continuations, self.chain.checkout
        text = training_plan(self.chain.words, jobs, checkout, self.environ)
        return self.done("train", f"TRAIN is the last of these jobs\n{text}")

    def stage(self, job: StageJob) -> Jobs:
        path, checkout = script_path(job, self.where), self.where.checkout
        path = path.relative_to(checkout) if path.is_relative_to(checkout) else path
        return self.done(job.stage, f"sbatch --parsable {path}\n{script_text(job, self.where)}")

    def evaluate(self, after: Jobs) -> Jobs:
        composed, chain = self.composed, self.chain
        if isinstance(composed, UserError):
            keys = evaluated_config(chain).igrpo.evaluation.model_dump()
            setting = "\n".join(f"# {name}: {value}" for name, value in keys.items())
            return self.done("evaluate", f"not composed: {composed}\n{setting}")
        if _is_evaluated(chain, composed.evaluation):
            self.done("evaluate", f"{composed.evaluation.out} is complete")
            return ()
        title = "the commands and jobs of NeMo-Skills"
        try:
            composed.profile.check_own()
        except UserError as error:
            title = f"not to be submitted as it is: {error}"
        place = replace(composed.place, after=tuple(after), config_dir=chain.run / "stages")
        profile = composed.profile.config_dir
        text = evaluation_text(composed.evaluation, place, self.environ, profile)
        return self.done("evaluate", f"{title}\n{text}")


def convert_job(chain: Experiment, after: Jobs) -> StageJob:
    """The conversion, behind the last of the training's jobs."""
    command = ("python", "pipelines/convert.py", "--checkpoint", chain.which, *chain.words)
    return StageJob("convert", command, gpus=1, time=CONVERT_TIME, after=tuple(after))


def compare_job(chain: Experiment, evaluation: Path, after: Jobs) -> StageJob:
    """The comparison, behind all of the evaluation's jobs."""
    request = request_of(chain, evaluation)
    flags = [word for name in request.experiments for word in ("--experiment", name)]
    flags += ["--anyway"] if request.anyway else []
    command = ("python", "pipelines/compare.py", "--out", str(chain.comparison), *flags)
    return StageJob("compare", (*command, *request.systems), 0, COMPARE_TIME, tuple(after))


def _surroundings(chain: Experiment, environ: Mapping[str, str]) -> Surroundings:
    """Where the stages run. Raises `UserError` for what cannot run there."""
    if chain.evaluator == "igrpo":
        raise UserError("--evaluator igrpo evaluates here: leave out --cluster")
    check_convertible(chain.config)
    is_trained(chain.config)
    config = with_site(chain.config, chain.checkout, environ, chain.words)
    settings = job_settings(config, chain.checkout, environ)
    where = Surroundings(config.igrpo.site, chain.checkout, chain.run, settings)
    script_text(convert_job(chain, ()), where)  # both stages' have the same options
    return where


def _composed(
    chain: Experiment, where: Surroundings, environ: Mapping[str, str], folder: Path
) -> Composed:
    """The evaluation and where it runs; the chain's NeMo-Skills profile is put into `folder`."""
    site = where.site
    environment = find_environment(environ)
    evaluation = chain_evaluation(chain, environment, hf_home=site.hf_home)
    name = chain.skills_profile or f"slurm_{site.gpu.partition('_')[0]}"
    config_dir = chain.config_dir or chain.checkout / "configs" / "cluster_configs"
    profile = profile_for(site, name, config_dir, run_folders(where), folder)
    place = profile.place(evaluation.out, jobs=chain.jobs, sbatch=sbatch_options(site))
    server = replace(evaluation.server, model=profile.seen(evaluation.server.model))
    return Composed(profile, replace(evaluation, server=server), place)


def _is_converted(chain: Experiment) -> bool:
    return is_converted(chain.run, chain.which, training_inputs(chain.config))


def _is_evaluated(chain: Experiment, evaluation: SkillsEvaluation) -> bool:
    """Whether the evaluation is complete, and of weights that are there.

    Raises `UserError` where its folder holds samples of other data.
    """
    return is_complete(evaluation) and _is_converted(chain)

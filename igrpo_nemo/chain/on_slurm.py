"""A chain on Slurm: every stage is submitted at once, each behind the success of the one before.

    igrpo launch (afterok and singleton among continuation jobs)
      --afterok--> RUN/stages/convert.sh --afterok--> NeMo-Skills' jobs
      --afterok--> RUN/stages/compare.sh

Stages that are done are left out. Everything that can be checked is checked before the first job
is submitted. The plan prints exactly what would be.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from igrpo_nemo.chain.conversion import check_convertible, is_converted
from igrpo_nemo.chain.experiment import Experiment, is_trained
from igrpo_nemo.chain.stages import (
    chain_evaluation,
    compare_chain,
    compared_names,
    evaluated,
)
from igrpo_nemo.cluster.client import naming_submitted
from igrpo_nemo.cluster.job import (
    StageJob,
    Surroundings,
    script_path,
    script_text,
    submit_stage,
)
from igrpo_nemo.cluster.launch import Launch, plan_text, prepare_launch, submit_launch
from igrpo_nemo.cluster.site import job_settings, with_site
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.skills.cluster import (
    ClusterProfile,
    evaluation_text,
    placed,
    profile_for,
    submit,
)
from igrpo_nemo.evaluation.skills.command import Place
from igrpo_nemo.evaluation.skills.evaluate import SkillsEvaluation, is_complete, next_round
from igrpo_nemo.evaluation.skills.program import find_environment

Jobs = Sequence[int | str]
"""Numbers of jobs that Slurm gave, or names that stand for them in a plan."""


class Composed(NamedTuple):
    """The evaluation before anything is submitted: nothing of it can fail any more."""

    profile: ClusterProfile
    evaluation: SkillsEvaluation
    place: Place

    @property
    def out(self) -> Path:
        return self.evaluation.out


def submit_all(chain: Experiment, environ: Mapping[str, str]) -> int:
    """Submits what is not done yet; 0. Raises `UserError` naming what was submitted before that."""
    where = _surroundings(chain, environ)
    composed = _composed(chain, where, environ, chain.run / "stages")
    if _is_evaluated(chain, composed.evaluation):
        print(compare_chain(chain, composed.out.parent if chain.refine else composed.out))
        return 0
    composed.profile.check_own()
    # NeMo-Skills checks every argument while nothing is submitted yet.
    submit(composed.evaluation, composed.place, environ, dry_run=True)
    sent: list[int] = []
    with naming_submitted(lambda: sent):
        _submit_stages(chain, where, environ, composed, sent)
    print(f"the tables of the comparison will be in {chain.comparison}")
    print("the same command later checks what is done and submits what is missing")
    if composed.evaluation.refinement is not None:
        print("refined answers come after the bare ones: give it again once these are there")
    return 0


def _submit_stages(
    chain: Experiment,
    where: Surroundings,
    environ: Mapping[str, str],
    composed: Composed,
    sent: list[int],
) -> None:
    """Each job's number is in `sent` as soon as it has one."""
    if is_trained(chain.config):
        print(f"train: {chain.run} is finished", flush=True)
    else:
        sent += submit_launch(_launch(chain, environ), environ)
    if _is_converted(chain):
        print(f"convert: {chain.model} is there", flush=True)
    else:
        sent.append(submit_stage(_convert_job(chain, sent[-1:]), where, environ))
        print(f"convert: job {sent[-1]}", flush=True)
    # None where mending the files made it complete.
    jobs = submit(composed.evaluation, replace(composed.place, after=tuple(sent[-1:])), environ)
    told = f"jobs {' '.join(map(str, jobs))}, into {composed.out}"
    print(f"evaluate: {told if jobs else f'{composed.out} is complete'}")
    sent += jobs
    sent.append(submit_stage(_compare_job(chain, composed.out, jobs or sent[-1:]), where, environ))
    print(f"compare: job {sent[-1]}", flush=True)


def slurm_plan(chain: Experiment, environ: Mapping[str, str]) -> str:
    """Every job that `submit_all` would submit, with its batch file; TRAIN and the like stand for
    numbers that Slurm gives. Where NeMo-Skills or its data is missing, its part says so."""
    where = _surroundings(chain, environ)
    parts, after = {"train": f"{chain.run} is finished"}, list[str]()
    if not is_trained(chain.config):
        text = plan_text(_launch(chain, environ, dry_run=True))
        parts["train"], after = f"TRAIN is the last of these jobs\n{text}", ["TRAIN"]
    parts["convert"] = f"{chain.model} is there"
    if not _is_converted(chain):
        parts["convert"], after = _script_plan(_convert_job(chain, after), where), ["CONVERT"]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            composed = _composed(chain, where, environ, Path(scratch))
        except UserError as error:
            keys = evaluated(chain).igrpo.evaluation.model_dump()
            setting = "\n".join(f"# {name}: {value}" for name, value in keys.items())
            out, after = chain.run, ["EVALUATE"]
            parts["evaluate"] = f"not composed: {error}\n{setting}"
        else:
            out, parts["evaluate"] = composed.out, f"{composed.out} is complete"
            if not _is_evaluated(chain, composed.evaluation):
                parts["evaluate"] = _evaluation_plan(chain, composed, after, environ)
                after = ["EVALUATE"]
    parts["compare"] = _script_plan(_compare_job(chain, out, after), where)
    return "\n".join(f"##### {name}\n# {text.rstrip()}\n" for name, text in parts.items())


def _script_plan(job: StageJob, where: Surroundings) -> str:
    path, checkout = script_path(job, where), where.checkout
    path = path.relative_to(checkout) if path.is_relative_to(checkout) else path
    return f"sbatch --parsable {path}\n{script_text(job, where)}"


def _evaluation_plan(
    chain: Experiment, composed: Composed, after: Jobs, environ: Mapping[str, str]
) -> str:
    title = "the commands and jobs of NeMo-Skills"
    try:
        composed.profile.check_own()
    except UserError as error:
        title = f"not to be submitted as it is: {error}"
    place = replace(composed.place, after=tuple(after), config_dir=chain.run / "stages")
    profile = composed.profile.config_dir
    return f"{title}\n{evaluation_text(composed.evaluation, place, environ, profile)}"


def _launch(chain: Experiment, environ: Mapping[str, str], *, dry_run: bool = False) -> Launch:
    """The training's jobs; a single one continues itself."""
    jobs = chain.continuations if chain.continuations > 1 else None
    return prepare_launch(chain.words, chain.checkout, environ, chain=jobs, dry_run=dry_run)


def _convert_job(chain: Experiment, after: Jobs) -> StageJob:
    command = ("python", "pipelines/convert.py", "--checkpoint", chain.which, *chain.words)
    return StageJob("convert", command, gpus=1, time="04:00:00", after=tuple(after))


def _compare_job(chain: Experiment, evaluation: Path, after: Jobs) -> StageJob:
    systems, experiments = compared_names(chain, evaluation)
    flags = [word for name in experiments for word in ("--experiment", name)]
    flags += ["--anyway"] if chain.anyway else []
    command = ("python", "pipelines/compare.py", "--out", str(chain.comparison), *flags, *systems)
    return StageJob("compare", command, gpus=0, time="01:00:00", after=tuple(after))


def _surroundings(chain: Experiment, environ: Mapping[str, str]) -> Surroundings:
    """Where the stages run. Raises `UserError` for what cannot run there."""
    if chain.evaluator == "igrpo":
        raise UserError("--evaluator igrpo evaluates here: leave out --cluster")
    check_convertible(chain.config)
    is_trained(chain.config)
    config = with_site(chain.config, chain.checkout, environ, chain.words)
    settings = job_settings(config, chain.checkout, environ)
    where = Surroundings(config.igrpo.site, chain.checkout, chain.run, settings)
    script_text(_convert_job(chain, ()), where)  # both stages' have the same options
    return where


def _composed(
    chain: Experiment, where: Surroundings, environ: Mapping[str, str], folder: Path
) -> Composed:
    """The evaluation and where it runs; the chain's NeMo-Skills profile is put into `folder`."""
    site = where.site
    bare = chain_evaluation(chain, find_environment(environ), hf_home=site.hf_home)
    name = chain.skills_profile or f"slurm_{site.gpu.partition('_')[0]}"
    config_dir = chain.config_dir or chain.checkout / "configs" / "cluster_configs"
    profile = profile_for(site, name, config_dir, where.run_folders, folder)
    evaluation = next_round(bare)
    return Composed(profile, evaluation, placed(evaluation, profile, site, chain.jobs))


def _is_converted(chain: Experiment) -> bool:
    """Raises `UserError` for a model of a run that goes on: its last weights are yet to come."""
    if chain.which.isdecimal() or is_trained(chain.config):
        return is_converted(chain.run, chain.which)
    if chain.model.exists():
        raise UserError(f"{chain.run} goes on after {chain.model} was made: remove that folder")
    return False


def _is_evaluated(chain: Experiment, evaluation: SkillsEvaluation) -> bool:
    """Whether the evaluation is complete, and of weights that are there.

    Raises `UserError` where its folder holds samples of other data.
    """
    return is_complete(evaluation) and _is_converted(chain)

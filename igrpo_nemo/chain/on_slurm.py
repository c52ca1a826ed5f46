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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from igrpo_nemo.chain.comparison import Request, compare, summary_text
from igrpo_nemo.chain.conversion import check_convertible, is_converted
from igrpo_nemo.chain.evaluation import Choices, evaluated_config, skills_evaluation
from igrpo_nemo.chain.experiment import Chain
from igrpo_nemo.chain.here import with_chain
from igrpo_nemo.chain.training import is_trained, submit_training, training_inputs, training_plan
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
from igrpo_nemo.config.igrpo_keys import Site
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.setting import check_same
from igrpo_nemo.evaluation.skills.cluster_yaml import sbatch_options
from igrpo_nemo.evaluation.skills.command import Place
from igrpo_nemo.evaluation.skills.environment import (
    find_environment,
)
from igrpo_nemo.evaluation.skills.evaluate import SkillsEvaluation, lacking_of
from igrpo_nemo.evaluation.skills.submit import (
    ClusterProfile,
    cluster_profile,
    evaluation_text,
    submit,
)
from igrpo_nemo.files.atomic import write_or_refuse

CONVERT_TIME = "04:00:00"
COMPARE_TIME = "01:00:00"


@dataclass(frozen=True, slots=True)
class SlurmChoices:
    """What the command line says about Slurm. `continuations`: jobs of the training; a single one
    requeues itself. `jobs`: among how many the samples of an evaluation are shared."""

    checkout: Path
    continuations: int = 1
    skills_profile: str | None = None
    config_dir: Path | None = None
    jobs: int = 8


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known before anything is submitted: nothing of it can fail any more."""

    where: Surroundings
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
    prepared = _prepared(chain, choices, slurm, environ, chain.run / "stages")
    evaluation, place = prepared.evaluation, prepared.place
    if _is_evaluated(chain, evaluation):
        comparison = compare(with_chain(request, chain, str(evaluation.out)), chain.comparison)
        print(summary_text(comparison, chain.comparison))
        return 0
    prepared.profile.check_own()
    # NeMo-Skills checks every argument while nothing is submitted yet.
    submit(evaluation, place, environ, dry_run=True)
    sent: list[int] = []
    try:
        sent += submit_training(
            chain.config, chain.words, slurm.continuations, slurm.checkout, environ
        )
        if not _is_converted(chain):
            sent.append(submit_stage(convert_job(chain, sent), prepared.where, environ))
            print(f"convert: job {sent[-1]}", flush=True)
        place = replace(place, after=tuple(sent[-1:]))
        evaluating = _submit_evaluation(evaluation, place, environ)
        sent += evaluating
        job = compare_job(chain, request, evaluation.out, evaluating or sent[-1:])
        comparing = submit_stage(job, prepared.where, environ)
    except UserError as error:
        ids = " ".join(map(str, sent))
        told = f"; submitted before that: {ids} (scancel {ids} takes them back)" if sent else ""
        raise UserError(f"{error}{told}") from error
    print(f"compare: job {comparing}; its tables will be in {chain.comparison}")
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
    where = _surroundings(chain, slurm, environ)
    after: tuple[int | str, ...] = ()
    parts = []
    if is_trained(chain.config):
        parts.append(_titled("train", f"# {chain.run} is finished"))
    else:
        text = training_plan(chain.words, slurm.continuations, slurm.checkout, environ)
        parts.append(_titled("train", f"# TRAIN is the last of these jobs\n{text}"))
        after = ("TRAIN",)
    if _is_converted(chain):
        parts.append(_titled("convert", f"# {chain.model} is there"))
    else:
        parts.append(_stage_text(convert_job(chain, after), where))
        after = ("CONVERT",)
    folder, text = _evaluation_plan(chain, choices, slurm, after, environ)
    parts.append(_titled("evaluate", text))
    parts.append(_stage_text(compare_job(chain, request, folder, ("EVALUATE",)), where))
    return "\n".join(parts)


def _evaluation_plan(
    chain: Chain,
    choices: Choices,
    slurm: SlurmChoices,
    after: tuple[int | str, ...],
    environ: Mapping[str, str],
) -> tuple[Path, str]:
    """The folder of the results, and the evaluation's part of the plan."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            # NeMo-Run writes the jobs' files into job_dir before it shows them.
            prepared = _prepared(chain, choices, slurm, environ, Path(scratch), job_dir=scratch)
        except UserError as error:
            keys = evaluated_config(chain, choices).igrpo.evaluation.model_dump()
            setting = "\n".join(f"# {name}: {value}" for name, value in keys.items())
            return chain.run, f"# not composed: {error}\n{setting}"
        evaluation = prepared.evaluation
        if _is_evaluated(chain, evaluation):
            return evaluation.out, f"# {evaluation.out} is complete"
        place = replace(prepared.place, after=after)
        name, folder = _profile_of(slurm, prepared.where.site)
        own = replace(cluster_profile(name, folder), account=prepared.profile.account)
        text = _warning(own) + evaluation_text(evaluation, place, environ)
        real = {scratch: _read_values(name, folder)["job_dir"]}
        real[f"--config_dir={scratch}"] = f"--config_dir={chain.run / 'stages'}"
    for before in sorted(real, key=len, reverse=True):
        text = text.replace(before, real[before])
    return evaluation.out, text


def convert_job(chain: Chain, after: Sequence[int | str]) -> StageJob:
    """The conversion, behind the last of the training's jobs."""
    command = ("python", "pipelines/convert.py", "--checkpoint", chain.which, *chain.words)
    return StageJob("convert", command, gpus=1, time=CONVERT_TIME, after=tuple(after[-1:]))


def compare_job(
    chain: Chain, request: Request, evaluation: Path, after: Sequence[int | str]
) -> StageJob:
    """The comparison, behind all of the evaluation's jobs."""
    whole = with_chain(request, chain, str(evaluation))
    flags = [word for name in whole.experiments for word in ("--experiment", name)]
    flags += ["--anyway"] if whole.anyway else []
    command = ("python", "pipelines/compare.py", "--out", str(chain.comparison), *flags)
    return StageJob("compare", (*command, *map(str, whole.systems)), 0, COMPARE_TIME, tuple(after))


def _prepared(
    chain: Chain,
    choices: Choices,
    slurm: SlurmChoices,
    environ: Mapping[str, str],
    folder: Path,
    **values: str,
) -> Prepared:
    """Everything that may be wrong, before anything is submitted; the chain's NeMo-Skills profile,
    with `values` in it, is written into `folder`."""
    check_convertible(chain.config)
    is_trained(chain.config)
    if choices.evaluator == "igrpo":
        raise UserError("--evaluator igrpo evaluates here: leave out --cluster")
    where = _surroundings(chain, slurm, environ)
    script_text(convert_job(chain, ()), where)  # both stages' have the same options
    environment = find_environment(environ)
    evaluation = skills_evaluation(chain, choices, environment, hf_home=where.site.hf_home)
    name, config_dir = _profile_of(slurm, where.site)
    profile = chain_profile(name, config_dir, where.site, run_folders(where), folder, **values)
    options = sbatch_options(where.site)
    place = profile.place(evaluation.out, jobs=slurm.jobs, sbatch=options)
    server = replace(evaluation.server, model=profile.seen(evaluation.server.model))
    return Prepared(where, profile, replace(evaluation, server=server), place)


def _warning(profile: ClusterProfile) -> str:
    """A line of the plan where nothing would be submitted with this profile."""
    try:
        profile.check_own()
    except UserError as error:
        return f"# not to be submitted as it is: {error}\n"
    return ""


def _profile_of(slurm: SlurmChoices, site: Site) -> tuple[str, Path]:
    folder = slurm.config_dir or slurm.checkout / "configs" / "cluster_configs"
    return slurm.skills_profile or _default_profile(site.gpu), folder


def _surroundings(chain: Chain, slurm: SlurmChoices, environ: Mapping[str, str]) -> Surroundings:
    site = site_profile(chain.config, slurm.checkout, environ, chain.words)
    config = chain.config.replaced("igrpo", site=site)
    return Surroundings(
        site, slurm.checkout, chain.run, job_settings(config, site, slurm.checkout, environ)
    )


def _is_converted(chain: Chain) -> bool:
    return is_converted(chain.run, chain.which, training_inputs(chain.config))


def _is_evaluated(chain: Chain, evaluation: SkillsEvaluation) -> bool:
    """Whether the evaluation is complete, and of weights that are there.

    Raises `UserError` where its folder holds samples of other data.
    """
    check_same(evaluation.out, evaluation.setting)
    return _is_converted(chain) and not lacking_of(evaluation)


def _submit_evaluation(
    evaluation: SkillsEvaluation, place: Place, environ: Mapping[str, str]
) -> list[int]:
    """The jobs of what is missing; none where mending the files made it complete."""
    jobs = submit(evaluation, place, environ)
    if jobs is None:
        print(f"evaluate: {evaluation.out} is complete", flush=True)
        return []
    if not jobs:
        raise UserError(
            f"NeMo-Skills named no job that it submitted: see the newest log in {evaluation.out}"
        )
    print(f"evaluate: jobs {' '.join(map(str, jobs))}, into {evaluation.out}", flush=True)
    return jobs


def _stage_text(job: StageJob, where: Surroundings) -> str:
    path = script_path(job, where)
    path = path.relative_to(where.checkout) if path.is_relative_to(where.checkout) else path
    return _titled(job.stage, f"# sbatch --parsable {path}\n{script_text(job, where)}")


def _titled(stage: str, text: str) -> str:
    return f"##### {stage}\n{text.rstrip()}\n"


def chain_profile(
    name: str, config_dir: Path, site: Site, needed: Sequence[Path], folder: Path, **values: Any
) -> ClusterProfile:
    """Writes `folder/NAME.yaml` and reads it: what the site says wins, and every `needed` folder
    (absolute) that no mount has is mounted at its own name, as the training's containers do.
    `values` replace keys of the profile."""
    cluster_profile(name, config_dir)  # its complaints name the user's file
    values = {**_read_values(name, config_dir), **_of_site(site), **values}
    mounts = [str(mount) for mount in values.get("mounts") or []]
    for path in needed:
        sources = [Path(mount.split(":")[0]) for mount in mounts]
        if not any(path == source or source in path.parents for source in sources):
            mounts.append(f"{path}:{path}")
    values["mounts"] = mounts
    write_or_refuse(folder / f"{name}.yaml", yaml.safe_dump(values, sort_keys=False))
    return cluster_profile(name, folder)


def _read_values(name: str, config_dir: Path) -> dict[str, Any]:
    """The keys of `config_dir/NAME.yaml`."""
    return yaml.safe_load((config_dir / f"{name}.yaml").read_text(encoding="utf-8"))


def _default_profile(gpu: str) -> str:
    """The profile's name for a kind of GPU."""
    return f"slurm_{gpu.partition('_')[0]}"


def _of_site(site: Site) -> dict[str, Any]:
    values = {"account": site.account, "partition": site.partition, "default_timeout": site.time}
    # A chain's stages start where the one before succeeded.
    known: dict[str, Any] = {name: value for name, value in values.items() if value}
    return {**known, "dependency_type": "afterok"}

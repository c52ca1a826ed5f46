"""From the words of a command line to jobs in Slurm's queue: what `igrpo launch` does.

words, profile ─ composed ─> finished already? queued already? preflight ─ prepare_launch ─> Launch
Launch ─ submit_launch ─> job ids        Launch ─ plan_text ─> what would be submitted
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from igrpo_nemo.cluster.checkout import EVALUATION_SCRIPT, find_script, script_words
from igrpo_nemo.cluster.client import Job
from igrpo_nemo.cluster.job import Submission, submission
from igrpo_nemo.cluster.site import site_profile
from igrpo_nemo.cluster.submit import (
    dry_run_text,
    is_finished,
    queued_jobs,
    reopen_if_longer,
    submit_chain,
)
from igrpo_nemo.cluster.worker_environments import check_worker_environments
from igrpo_nemo.config import Config, load_config
from igrpo_nemo.config.site_keys import Site
from igrpo_nemo.errors import UserError
from igrpo_nemo.preflight import Plan, preflight
from igrpo_nemo.run.folder import check_same_run

NO_RUN = ("engine=nemo_rl", "policy.model_name=none")
"""Makes a config complete of which only the cluster profile is wanted."""
EVALUATION_LOGS = "runs/evaluate"


class PreflightRefusal(UserError):
    """The preflight's problems, a line each; nothing was submitted."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(" ".join(problem.split()) for problem in problems)
        super().__init__(f"the preflight says no: {'; '.join(self.problems)}")


@dataclass(frozen=True, slots=True)
class Launch:
    """Jobs that may be submitted. `plan` is None for an evaluation, which is no run; `finished`:
    the run has had all its steps; `queued`: its jobs that run or wait."""

    config: Config
    job: Submission
    checkout: Path
    plan: Plan | None = None
    length: int = 1
    finished: bool = False
    queued: tuple[Job, ...] = ()


def composed(
    words: Sequence[str], checkout: Path, environ: Mapping[str, str]
) -> tuple[Config, Site]:
    """The config of overrides, and the cluster profile that is filled in there too."""
    config = load_config(words)
    site = site_profile(config, checkout, environ, words)
    return config.replaced("igrpo", site=site), site


def is_evaluation(script: str | None) -> bool:
    return script is not None and Path(script).name == EVALUATION_SCRIPT


def job_words(script: str | None, words: Sequence[str]) -> list[str]:
    """The overrides that say what a script's job is: of an evaluation's words, which are those of
    pipelines/evaluate.py, only the cluster profile's. Its logs go to a folder of their own."""
    if not is_evaluation(script):
        return list(words)
    own = [word for word in words if word.lstrip("+").startswith(("cluster=", "igrpo.site."))]
    return [*NO_RUN, f"logger.log_dir={EVALUATION_LOGS}", *own]


def prepare_launch(
    words: Sequence[str],
    checkout: Path,
    environ: Mapping[str, str],
    *,
    script: str | None = None,
    start: Path | None = None,
    chain: int | None = None,
    dry_run: bool = False,
) -> Launch:
    """Everything that can be checked before Slurm is asked to take a job.

    `script` is looked for in `start` first, then in `checkout`; `chain` is the number of jobs, each
    behind the one before. Raises `PreflightRefusal`, and `UserError` for all else that cannot work.
    """
    found = find_script(script, start or checkout, checkout)
    if is_evaluation(script):
        if chain is not None:
            raise UserError("--chain is for training: an evaluation goes on where it was by itself")
        config, site = composed(job_words(script, words), checkout, environ)
        job = submission(config, site, found, words, checkout, training=False)
        return Launch(config, job, checkout)
    words = [*script_words(checkout / found), *words]
    config, site = composed(words, checkout, environ)
    job = submission(config, site, found, words, checkout)
    if not config.checkpointing.enabled:
        warnings.warn(
            "checkpointing.enabled=false: a job that is stopped starts over", stacklevel=2
        )
    if config.igrpo.model is None:  # a built-in model gets its name when it is made
        check_same_run(job.run_folder, config.to_dict())
    if is_finished(job.run_folder, config):
        return Launch(config, job, checkout, finished=True)
    queued = () if dry_run else queued_jobs(job, in_chain=chain is not None)
    plan = _passed(config, environ)
    check_worker_environments(config, site, checkout, environ)
    return Launch(config, job, checkout, plan, chain or 1, queued=tuple(queued))


def submit_launch(launch: Launch, environ: Mapping[str, str]) -> list[int]:
    """The numbers of the jobs; none where the run is finished."""
    if launch.finished:
        print(f"{finished_text(launch)}")
        return []
    if launch.plan is not None and reopen_if_longer(launch.job.run_folder, launch.config):
        print(f"{launch.job.run_folder} was finished and goes on")
    return submit_chain(launch.job, launch.length, launch.queued, launch.checkout, environ)


def plan_text(launch: Launch) -> str:
    """What would be submitted."""
    if launch.finished:
        return f"{finished_text(launch)}\n"
    checks = "" if launch.plan is None else launch.plan.text()
    return dry_run_text(launch.job, launch.length, checks, launch.checkout)


def finished_text(launch: Launch) -> str:
    folder = launch.job.run_folder
    return f"{folder} is finished: nothing to submit (raise grpo.max_num_steps to go on)"


def _passed(config: Config, environ: Mapping[str, str]) -> Plan:
    hf_home = config.igrpo.site.hf_home
    plan = preflight(config, environ={**environ, **({"HF_HOME": hf_home} if hf_home else {})})
    if plan.problems:
        raise PreflightRefusal(plan.problems)
    return plan

"""From the words of a command line to jobs in Slurm's queue: what `igrpo launch` does.

words, profile ─ composed ─> finished already? queued already? preflight ─ prepare_launch ─> Launch
Launch ─ submit_launch ─> job ids        Launch ─ plan_text ─> what would be submitted

Never two jobs of a run at once; in a chain each job awaits the last.
"""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from igrpo_nemo.cluster.client import Job, my_jobs, naming_submitted, submit
from igrpo_nemo.cluster.job import (
    EVALUATION_SCRIPT,
    LOGS,
    Submission,
    find_script,
    jobs_of,
    sbatch_command,
    script_words,
)
from igrpo_nemo.cluster.site import sbatch_environment, with_site
from igrpo_nemo.cluster.worker_environments import check_worker_environments
from igrpo_nemo.config import Config, load_config
from igrpo_nemo.config.section import at
from igrpo_nemo.errors import UserError
from igrpo_nemo.files.atomic import check_folder
from igrpo_nemo.preflight import Plan, preflight
from igrpo_nemo.rewards.judge import judge_problems
from igrpo_nemo.run.folder import FINISHED, stored_config
from igrpo_nemo.run.identity import LENGTH, check_same_run

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

    job: Submission
    plan: Plan | None = None
    length: int = 1
    finished: bool = False
    queued: tuple[Job, ...] = ()


def composed(words: Sequence[str], checkout: Path, environ: Mapping[str, str]) -> Config:
    return with_site(load_config(words), checkout, environ, words)


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
        config = composed(job_words(script, words), checkout, environ)
        return Launch(Submission(config, checkout, found, tuple(words), trains=False))
    words = (*script_words(checkout / found), *words)
    config = composed(words, checkout, environ)
    job = Submission(config, checkout, found, words)
    if not config.checkpointing.enabled:
        warnings.warn(
            "checkpointing.enabled=false: a job that is stopped starts over", stacklevel=2
        )
    if config.igrpo.model is None:  # a built-in model gets its name when it is made
        check_same_run(job.run_folder, config.to_dict())
    if is_finished(job.run_folder, config):
        return Launch(job, finished=True)
    queued = () if dry_run else _queued(job, in_chain=chain is not None)
    plan = preflight(config, environ=environ)
    problems = plan.problems or (() if dry_run else judge_problems(config.igrpo))
    if problems:
        raise PreflightRefusal(problems)
    check_worker_environments(config, checkout, environ)
    return Launch(job, plan, chain or 1, queued=tuple(queued))


def submit_launch(launch: Launch, environ: Mapping[str, str]) -> list[int]:
    """Submits the jobs, each behind the one before and the first behind what is queued, and prints
    what one wants to know next. The numbers of the jobs; none where the run is finished.

    Raises `UserError` where Slurm refuses one; what was submitted before it stays in the queue.
    """
    job = launch.job
    if launch.finished:
        print(_finished_text(job), flush=True)
        return []
    if job.trains and reopen_if_longer(job.run_folder, job.config):
        print(f"{job.run_folder} was finished and goes on")
    logs = job.run_folder / LOGS
    check_folder(logs, "the job logs there")
    environ = sbatch_environment(environ)
    after = launch.queued[-1].id if launch.queued else None
    numbers: list[int] = []
    with naming_submitted(lambda: numbers):
        for _ in range(launch.length):
            after = submit(sbatch_command(job, after), job.checkout, environ)
            numbers.append(after)
    print(_submitted_text(job, numbers), flush=True)
    return numbers


def plan_text(launch: Launch) -> str:
    """The checks as comments, the commands as a shell could run them, and the script's own text."""
    job, several = launch.job, launch.length > 1
    if launch.finished:
        return f"{_finished_text(job)}\n"
    lines = (
        [f"# {line}".rstrip() for line in launch.plan.text().splitlines()] if launch.plan else []
    )
    lines += [f"# run folder: {job.run_folder}", f"cd {shlex.quote(str(job.checkout))}"]
    for number in range(1, launch.length + 1):
        command = sbatch_command(job, f"JOB{number - 1}" if number > 1 else None)
        text = shlex.join(command).replace("=afterok:JOB", "=afterok:$JOB", 1)
        lines.append(f"JOB{number}=$({text})" if several else text)
    script = (job.checkout / job.script).read_text(encoding="utf-8")
    return "\n".join([*lines, "", f"# {job.script}", script])


def _queued(job: Submission, *, in_chain: bool) -> list[Job]:
    """The run's jobs that run or wait, oldest first.

    Raises `UserError` where there are some and the new one is not to queue up behind them.
    """
    queued = [each for each in jobs_of(job.run_folder, my_jobs()) if each.active]
    if queued and not in_chain:
        told = ", ".join(f"{each.id} ({each.state})" for each in queued)
        raise UserError(
            f"{job.run_folder} has a job already: {told}; scancel it first, add jobs behind it "
            "with --chain K, or give this run another logger.log_dir"
        )
    return queued


def is_finished(run_folder: Path, config: Config) -> bool:
    """Whether the last step of this config is done already."""
    return (run_folder / FINISHED).is_file() and not _is_longer(run_folder, config)


def reopen_if_longer(run_folder: Path, config: Config) -> bool:
    """Removes the marker of a finished run that is to go on; says whether it did. The job script
    looks at the marker before anything else."""
    marker = run_folder / FINISHED
    if not marker.is_file() or not _is_longer(run_folder, config):
        return False
    marker.unlink(missing_ok=True)
    return True


def _is_longer(run_folder: Path, config: Config) -> bool:
    before, now = stored_config(run_folder), config.to_dict()
    lengths = ((at(before, key), at(now, key)) for key in LENGTH)
    return any(isinstance(old, int) and new > old for old, new in lengths)


def _finished_text(job: Submission) -> str:
    return f"{job.run_folder} is finished: nothing to submit (raise grpo.max_num_steps to go on)"


def _submitted_text(job: Submission, numbers: Sequence[int]) -> str:
    first, ids = numbers[0], " ".join(map(str, numbers))
    folder = shlex.quote(str(job.run_folder))
    lines = [f"submitted job{'s' if len(numbers) > 1 else ''} {ids} ({job.name})"]
    if job.trains:
        lines += [f"run folder: {job.run_folder}", f"  igrpo status {folder}"]
    return "\n".join([*lines, f"  tail -F {folder}/{LOGS}/{first}.out", f"  scancel {ids}"])

"""An evaluation from its parts to checked results: prepared, completed, never believed unread.

config + model + data folder --skills_evaluation--> SkillsEvaluation (bare answers)
--prepare--> OUT/{setting.json,data/,profile/} --repair--> sample files to continue
--ns eval, for what is missing--> OUT/eval-results/ --inspect--> what is missing still
--next_round--> the same for refined answers, once the bare ones are complete
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from igrpo_nemo.cluster.client import has_slurm, my_jobs
from igrpo_nemo.config import Config
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.metrics import format_table
from igrpo_nemo.evaluation.model import Model
from igrpo_nemo.evaluation.refine import Refinement
from igrpo_nemo.evaluation.results import RESULTS_FOLDER, BenchmarkResults, inspect, inspected
from igrpo_nemo.evaluation.setting import (
    Setting,
    check_same,
    claim_folder,
    default_folder,
    setting_of,
)
from igrpo_nemo.evaluation.skills.command import (
    Place,
    eval_commands,
    started_arguments,
    tensor_parallel,
    write_profile,
)
from igrpo_nemo.evaluation.skills.data import BenchmarkData, freeze, read_benchmark
from igrpo_nemo.evaluation.skills.program import (
    ServerDied,
    SkillsEnvironment,
    child_environ,
    find_vllm,
    processes_with,
    run_logged,
    server_answers,
    vllm_serving,
)
from igrpo_nemo.evaluation.skills.refine import refined_evaluation
from igrpo_nemo.evaluation.skills.repair import repair
from igrpo_nemo.run import set_threads
from igrpo_nemo.run.lock import alone_in

LOG_FOLDER = "eval-logs"
SUBMITTED_FILE = "submitted.json"

NEVER = "DependencyNeverSatisfied"
"""Slurm's reason for a job that waits for the success of one that failed: it will not start."""


@dataclass(frozen=True, slots=True)
class SkillsEvaluation:
    """What to evaluate, and with what. `setting` holds the benchmarks of this call alone."""

    config: Config
    setting: Setting
    data: tuple[BenchmarkData, ...]
    out: Path
    environment: SkillsEnvironment
    address: str | None = None
    """A server that runs; without one, one is started on `gpus` GPUs."""
    gpus: int | None = None
    server_args: str = ""
    """Further arguments of a server that is started."""
    refinement: Refinement | None = None
    """A second round, of refined answers."""
    tokenizer: str = ""
    """The model (a folder, or a name on the hub) whose tokenizer cuts its drafts to size."""

    @property
    def names(self) -> list[str]:
        return [one.name for one in self.data]


def skills_evaluation(
    config: Config,
    model: Model,
    data_dir: Path,
    environment: SkillsEnvironment,
    *,
    base: Path,
    out: Path | None = None,
    server_type: str = "vllm",
    address: str | None = None,
    server_args: str = "",
    tokenizer: str | None = None,
    refinement: Refinement | None = None,
) -> SkillsEvaluation:
    """The evaluation of `igrpo.evaluation` for a model, which need not exist yet.

    `out` is by default a folder of the setting's own below `base`. `server_type` is NeMo-Skills'
    name; its "openai" changes the sampling. `tokenizer` is by default the model's. Raises
    `UserError` for data that is not prepared, and for fewer samples than drafts.
    """
    keys = config.igrpo.evaluation
    if refinement is not None:
        for name, samples in keys.benchmarks.items():
            refinement.check(samples, name)
    data = tuple(read_benchmark(data_dir, name) for name in keys.benchmarks)
    setting = setting_of(
        config, model, data, server_type=server_type, nemo_skills=environment.version
    )
    return SkillsEvaluation(
        config,
        setting,
        data,
        out or default_folder(base, setting),
        environment,
        address,
        tensor_parallel(keys.server_gpus, model.heads),
        server_args,
        refinement,
        tokenizer or model.name,
    )


def next_round(evaluation: SkillsEvaluation) -> SkillsEvaluation:
    """The evaluation itself, or that of its refined answers once its own are complete."""
    if evaluation.refinement is None or not is_complete(evaluation):
        return evaluation
    return refined_evaluation(evaluation)


def evaluate_here(
    evaluation: SkillsEvaluation,
    environ: Mapping[str, str],
    *,
    small: bool = False,
    again: bool = False,
) -> bool:
    """Runs on this machine what is missing, and prints what there is; whether nothing is missing.

    Without an `address` a server is started for as long as it takes: vLLM, or for `small` models
    the project's own. Raises `UserError` where the folder holds another evaluation, where no server
    answers, and while jobs of a cluster may still write into it; `again` says that none does.
    """
    if not is_complete(evaluation):
        with claimed(evaluation, again=again) as ours:
            if names := [one.benchmark for one in lacking_of(ours, mend=True)]:
                given = nullcontext(ours.address) if ours.address else None
                with given or _serving(ours, environ, small) as address:
                    _sample(replace(ours, address=address), address, names, environ)
    complete = report(evaluation.out, evaluation.names)
    if complete and evaluation.refinement is not None:
        refined = refined_evaluation(evaluation)
        return evaluate_here(refined, environ, small=small, again=again)
    return complete


def _serving(
    evaluation: SkillsEvaluation, environ: Mapping[str, str], small: bool
) -> AbstractContextManager[str]:
    """A server for the evaluation's model; its address. Raises `UserError` without a vLLM."""
    setting, out, policy = evaluation.setting, evaluation.out, evaluation.config.policy
    if small:
        set_threads(evaluation.config.igrpo.threads)
        from igrpo_nemo.evaluation.skills.serve import serving

        template = policy.tokenizer.chat_template
        return serving(Path(setting.model), precision=policy.precision, chat_template=template)
    vllm = find_vllm(environ) if setting.server_type == "vllm" else None
    if vllm is None:
        raise UserError(
            f"nothing answers for {setting.model}, and no vllm is on PATH (or named by VLLM): give "
            "the --address of a running server, or --cluster; evaluate.py --serve serves small "
            "models"
        )
    arguments = started_arguments(evaluation, str(out.absolute()))
    log = out / LOG_FOLDER / "vllm.log"
    return vllm_serving(vllm, setting.model, evaluation.gpus, arguments, log, environ)


def _sample(
    evaluation: SkillsEvaluation, address: str, names: Sequence[str], environ: Mapping[str, str]
) -> None:
    """`ns eval` for these benchmarks, against a server that runs."""
    if not server_answers(address):
        raise UserError(f"no server answers at {address}: start it, or give another --address")
    out, environment = evaluation.out, evaluation.environment
    child = child_environ(environment.bin, environ)
    child["NEMORUN_HOME"] = str(out.absolute() / LOG_FOLDER / "nemo_run")
    log = new_log(out)
    print(f"evaluating {', '.join(names)}; ns eval says the rest in {log}", flush=True)
    try:
        for arguments in eval_commands(evaluation, names, Place(str(out.absolute()))):
            alive = partial(server_answers, address)
            run_logged([environment.ns, *arguments], log, cwd=out, environ=child, alive=alive)
    except ServerDied:
        print(f"the server at {address} stopped answering", file=sys.stderr)


@contextmanager
def claimed(evaluation: SkillsEvaluation, *, again: bool = False) -> Iterator[SkillsEvaluation]:
    """The evaluation with its folder held, and filled with what the jobs read; the setting is then
    the folder's. Raises `UserError` where it holds another evaluation, and while something may
    still write into it; `again` says that no job of a cluster does."""
    out = evaluation.out
    with alone_in(out, "wait until it ends, or give another --out"):
        check_alone(out)
        if not again:
            check_not_running(out)
        yield prepare(evaluation)


def check_alone(out: Path) -> None:
    """Raises `UserError` while a process of a call that was killed samples into the folder."""
    where = out.absolute() / RESULTS_FOLDER
    if running := processes_with(f"++output_file={where}/"):
        raise UserError(
            f"process {running[0]} of an earlier call still samples into {out}: wait until it "
            "ends, or end it"
        )


def check_not_running(out: Path) -> None:
    """Raises `UserError` while jobs that were sent for this folder may still write into it."""
    path = out / SUBMITTED_FILE
    try:
        expname = json.loads(path.read_text(encoding="utf-8"))["expname"]
    except (FileNotFoundError, ValueError):
        return
    if not has_slurm():
        raise UserError(
            f"{out} waits for jobs {expname} of a cluster that this machine cannot ask: "
            f"once they have ended, give --again or remove {path}"
        )
    named = [job for job in my_jobs() if job.active and expname in job.name]
    if running := [job for job in named if job.reason != NEVER]:
        raise UserError(
            f"{len(running)} jobs {expname} are queued or running for {out}: wait until they end"
        )


def prepare(evaluation: SkillsEvaluation) -> SkillsEvaluation:
    setting = claim_folder(evaluation.out, evaluation.setting)
    try:  # boundary: the file system
        freeze(evaluation.data, evaluation.out)
        opened, refined = evaluation.setting.thinking_open, evaluation.setting.refine is not None
        write_profile(evaluation.config, evaluation.out, thinking_open=opened, refined=refined)
    except OSError as error:
        raise UserError(f"cannot write to {evaluation.out}: {error.strerror or error}") from error
    return replace(evaluation, setting=setting)


def lacking_of(evaluation: SkillsEvaluation, *, mend: bool = False) -> list[BenchmarkResults]:
    """The benchmarks of this call that lack something, after mending half-written sample files."""
    for one in evaluation.data if mend else ():
        repair(evaluation.out, one.name, evaluation.setting.benchmarks[one.name], one.rows)
    setting = json.loads(evaluation.setting.to_json())
    found = [inspect(evaluation.out, name, setting) for name in evaluation.names]
    return [one for one in found if one.missing]


def is_complete(evaluation: SkillsEvaluation) -> bool:
    """Whether nothing lacks. Raises `UserError` where the folder holds another evaluation."""
    check_same(evaluation.out, evaluation.setting)
    return not lacking_of(evaluation)


def new_log(out: Path) -> Path:
    """The log of one call of this evaluation, beside those of earlier ones."""
    folder = out / LOG_FOLDER
    return folder / f"ns-{len(list(folder.glob('ns-*.log'))) + 1}.log"


def report(out: Path, benchmarks: Sequence[str] | None = None) -> bool:
    """Prints the tables of what is complete, and what is missing; whether nothing is.

    The tables are NeMo-Skills' own, with standard errors, and with what cut replies cost.
    """
    found = inspected(out, benchmarks)
    lacking = [one for one in found if one.missing]
    for one in found:
        if one.missing:
            continue
        print(format_table(one.benchmark, one.metrics, one.accuracy.problems or 0.0))
        if truncated := one.truncated.mean:
            print(f"{100 * truncated:.2f} % of the replies were cut at their token limit")
    if len(lacking) < len(found):
        print(out / RESULTS_FOLDER, flush=True)
    if lacking:
        lines = [f"  {one.benchmark}: {'; '.join(one.missing)}" for one in lacking]
        print("\n".join([f"{out} is incomplete:", *lines]), file=sys.stderr)
    return not lacking

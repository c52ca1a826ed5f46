"""A chain on this machine: one stage after the other, each left alone where it is done already."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from igrpo_nemo.chain.conversion import check_convertible, convert
from igrpo_nemo.chain.experiment import Experiment, is_trained
from igrpo_nemo.chain.script import DONE, IGRPO, NO, STOPPED, run_to_its_end
from igrpo_nemo.chain.stages import (
    chain_evaluation,
    check_evaluation,
    compare_chain,
    embedded_command,
    evaluated,
    skills_of,
)
from igrpo_nemo.config import Config
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.results import read_results
from igrpo_nemo.evaluation.skills.evaluate import evaluate_here
from igrpo_nemo.run.folder import FINISHED


def run_here(chain: Experiment, environ: Mapping[str, str]) -> int:
    """Trains, converts, evaluates and compares; the exit code of the stage that stopped it, or 0.

    The same call goes on where this one stopped.
    """
    check_convertible(chain.config)
    environment = skills_of(chain, environ)
    check_evaluation(chain, environment is not None)
    if code := train_here(chain.config, chain.words):
        return _stopped("train", code)
    made = convert(chain.run, chain.which)
    print(f"convert: {chain.model} is step {made['step']} ({made['form']})")
    if environment is not None:
        evaluation = chain_evaluation(chain, environment)
        folder, small = evaluation.out, chain.config.igrpo.engine == "local"
        print(f"evaluate: NeMo-Skills {environment.version}, into {folder}", flush=True)
        code = DONE if evaluate_here(evaluation, environ, small=small) else NO
    else:
        code, folder = _evaluate_embedded(chain)
    if code:
        return _stopped("evaluate", code)
    print(f"compare:\n{compare_chain(chain, folder)}")
    return DONE


def plan_here(chain: Experiment, environ: Mapping[str, str]) -> str:
    """What `run_here` would do, a line a stage."""
    done = " (finished already)" if is_trained(chain.config) else ""
    keys = evaluated(chain).igrpo.evaluation
    if skills_of(chain, environ) is not None:
        names = " ".join(f"{name}:{samples}" for name, samples in keys.benchmarks.items())
        setting = f"temperature {keys.temperature:g}, top-p {keys.top_p:g}, {keys.profile}"
        evaluate = f"NeMo-Skills on {names} ({setting}) -> {chain.evaluations}"
        if chain.refine is not None:
            evaluate += f"\nrefined answers: the best of {chain.refine} drafts by {chain.choose}"
    else:
        evaluate = shlex.join(embedded_command(chain)[0])
    systems = " ".join([*chain.against, chain.label])
    return (
        f"train: igrpo train {shlex.join(chain.words)}{done}\n"
        f"convert: checkpoint {chain.which} -> {chain.model}\n"
        f"evaluate: {evaluate}\n"
        f"compare: {systems} -> {chain.comparison}"
    )


def train_here(config: Config, words: Sequence[str]) -> int:
    """Trains as `igrpo train` does, unless that is done already. 75: stopped, to be resumed."""
    run = Path(config.logger.log_dir)
    if is_trained(config):
        print(f"train: {run} is finished")
        return DONE
    code = _igrpo("train", ["igrpo", "train", *words])
    if code == 0 and not (run / FINISHED).is_file():
        code = STOPPED
    if code == STOPPED:
        print(f"train: {run} stopped with its state saved; the same command goes on")
    return code


def _evaluate_embedded(chain: Experiment) -> tuple[int, Path]:
    """`igrpo evaluate` on the run's held-out problems; the exit code and the folder."""
    command, out = embedded_command(chain)
    try:
        found = read_results(out).benchmarks.values()
        complete = all(one.num_samples == chain.samples for one in found) and not chain.refine
    except UserError:
        complete = False  # `igrpo evaluate` completes it, or says why it cannot
    if complete:
        print(f"evaluate: {out} is complete")
    return DONE if complete else _igrpo("evaluate", command), out


def _igrpo(stage: str, command: Sequence[str]) -> int:
    print(f"{stage}: {shlex.join(command)}", flush=True)
    return run_to_its_end([*IGRPO, *command[1:]])


def _stopped(stage: str, code: int) -> int:
    print(f"{stage} ended with exit code {code}; the same command goes on there", file=sys.stderr)
    return code

"""A chain on this machine: one stage after the other, each left alone where it is done already."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping

from igrpo_nemo.chain.comparison import compare_chain
from igrpo_nemo.chain.conversion import check_convertible, convert
from igrpo_nemo.chain.evaluation import (
    chain_evaluation,
    embedded_command,
    evaluate_embedded,
    evaluated_config,
    uses_skills,
)
from igrpo_nemo.chain.experiment import Experiment, training_inputs
from igrpo_nemo.chain.script import DONE, NO
from igrpo_nemo.chain.training import is_trained, train_here
from igrpo_nemo.evaluation.skills.evaluate import evaluate_here
from igrpo_nemo.evaluation.skills.program import find_environment


def run_here(chain: Experiment, environ: Mapping[str, str]) -> int:
    """Trains, converts, evaluates and compares; the exit code of the stage that stopped it, or 0.

    The same call goes on where this one stopped.
    """
    check_convertible(chain.config)
    with_skills = uses_skills(chain, environ)
    if code := train_here(chain.config, chain.words):
        return _stopped("train", code)
    made = convert(chain.run, chain.which, inputs=training_inputs(chain.config))
    print(f"convert: {chain.model} is step {made['step']} ({made['form']})")
    if with_skills:
        environment = find_environment(environ)
        evaluation = chain_evaluation(chain, environment)
        folder, small = evaluation.out, chain.config.igrpo.engine == "local"
        print(f"evaluate: NeMo-Skills {environment.version}, into {folder}", flush=True)
        code = DONE if evaluate_here(evaluation, environ, small=small) else NO
    else:
        code, folder = evaluate_embedded(chain)
    if code:
        return _stopped("evaluate", code)
    print(f"compare:\n{compare_chain(chain, folder)}")
    return DONE


def plan_here(chain: Experiment, environ: Mapping[str, str]) -> str:
    """What `run_here` would do, a line a stage."""
    done = " (finished already)" if is_trained(chain.config) else ""
    keys = evaluated_config(chain).igrpo.evaluation
    if uses_skills(chain, environ):
        names = " ".join(f"{name}:{samples}" for name, samples in keys.benchmarks.items())
        setting = f"temperature {keys.temperature:g}, top-p {keys.top_p:g}, {keys.profile}"
        evaluate = f"NeMo-Skills on {names} ({setting}) -> {chain.evaluations}"
    else:
        evaluate = shlex.join(embedded_command(chain)[0])
    systems = " ".join([*chain.against, chain.label])
    return (
        f"train: igrpo train {shlex.join(chain.words)}{done}\n"
        f"convert: checkpoint {chain.which} -> {chain.model}\n"
        f"evaluate: {evaluate}\n"
        f"compare: {systems} -> {chain.comparison}"
    )


def _stopped(stage: str, code: int) -> int:
    print(f"{stage} ended with exit code {code}; the same command goes on there", file=sys.stderr)
    return code

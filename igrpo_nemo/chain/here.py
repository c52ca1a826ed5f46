"""A chain on this machine: one stage after the other, each left alone where it is done already."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace

from igrpo_nemo.chain.comparison import Request, compare, summary_text
from igrpo_nemo.chain.conversion import check_convertible, convert
from igrpo_nemo.chain.evaluation import (
    Choices,
    embedded_command,
    evaluate_embedded,
    evaluate_here,
    evaluated_config,
    uses_skills,
)
from igrpo_nemo.chain.experiment import Chain, training_inputs
from igrpo_nemo.chain.training import is_trained, train_here


def run_here(chain: Chain, choices: Choices, request: Request, environ: Mapping[str, str]) -> int:
    """Trains, converts, evaluates and compares; the exit code of the stage that stopped it, or 0.

    `request` holds the other systems and options of the comparison. The same call goes on where
    this one stopped.
    """
    check_convertible(chain.config)
    with_skills = uses_skills(chain, choices, environ)
    if code := train_here(chain.config, chain.words):
        return _stopped("train", code)
    stamp = convert(chain.run, chain.which, inputs=training_inputs(chain.config))
    print(f"convert: {chain.model} is step {stamp.outputs['step']} ({stamp.outputs['form']})")
    if with_skills:
        code, folder = evaluate_here(chain, choices, environ)
    else:
        code, folder = evaluate_embedded(chain, choices)
    if code:
        return _stopped("evaluate", code)
    comparison = compare(with_chain(request, chain, str(folder)), chain.comparison)
    print(f"compare:\n{summary_text(comparison, chain.comparison)}")
    return 0


def with_chain(request: Request, chain: Chain, folder: str) -> Request:
    """The request with the chain's own evaluation as its last system."""
    return replace(request, systems=[*request.systems, f"{chain.label}={folder}"])


def plan_here(chain: Chain, choices: Choices, request: Request, environ: Mapping[str, str]) -> str:
    """What `run_here` would do, a line a stage."""
    words = shlex.join(chain.words)
    done = " (finished already)" if is_trained(chain.config) else ""
    lines = [
        f"train: igrpo train {words}{done}",
        f"convert: checkpoint {chain.which} -> {chain.model}",
    ]
    keys = evaluated_config(chain, choices).igrpo.evaluation
    if uses_skills(chain, choices, environ):
        names = " ".join(f"{name}:{samples}" for name, samples in keys.benchmarks.items())
        setting = f"temperature {keys.temperature:g}, top-p {keys.top_p:g}, {keys.profile}"
        lines.append(f"evaluate: NeMo-Skills on {names} ({setting}) -> {chain.evaluations}")
    else:
        lines.append(f"evaluate: {shlex.join(embedded_command(chain, choices)[0])}")
    systems = " ".join([*request.systems, chain.label])
    return "\n".join([*lines, f"compare: {systems} -> {chain.comparison}"])


def _stopped(stage: str, code: int) -> int:
    print(f"{stage} ended with exit code {code}; the same command goes on there", file=sys.stderr)
    return code

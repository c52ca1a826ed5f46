"""Evaluates a model on the paper's benchmarks through NeMo-Skills' `ns eval`.

    evaluate.py --model PATH                                         with vLLM, on this machine
    evaluate.py --model NAME --address http://127.0.0.1:8000/v1      a server that runs
    evaluate.py --model PATH --cluster mine                          jobs that start their own
    evaluate.py --model runs/demo/checkpoints/step_00000060 --serve  a small model, served here
    evaluate.py --check DIR                                          only read what is there

Settings are `igrpo.evaluation` of the config: eval=all_64, igrpo.evaluation.profile=boxed, ...
Results are believed by their files alone. What is missing is said, and the same command completes
it; a folder that holds another setting is refused. docs/evaluation.md says more.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from igrpo_nemo.chain.script import DONE, NO, ScriptParser, exit_code, overrides_of
from igrpo_nemo.cli.command import EVALUATION
from igrpo_nemo.cluster.site import with_site
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.model import chosen_model, default_base, evaluated_config, local_model
from igrpo_nemo.evaluation.refine import Refinement
from igrpo_nemo.evaluation.skills.cluster import cluster_profile, placed, submit
from igrpo_nemo.evaluation.skills.command import Place, eval_commands
from igrpo_nemo.evaluation.skills.data import default_data_folder, with_benchmarks
from igrpo_nemo.evaluation.skills.evaluate import (
    SkillsEvaluation,
    evaluate_here,
    next_round,
    report,
    skills_evaluation,
)
from igrpo_nemo.evaluation.skills.program import find_environment
from igrpo_nemo.evaluation.skills.refine import draft_prompts

CHECKOUT = Path(__file__).resolve().parents[1]


def main(words: Sequence[str]) -> int:
    flags, rest = _parser().parse_known_args(list(words))
    overrides = overrides_of(rest)
    if flags.check is not None:
        return DONE if report(flags.check) else NO
    environment = find_environment(os.environ)
    if warning := environment.version_warning:
        print(f"warning: {warning}", file=sys.stderr)
    if flags.model is None and flags.address is None:
        raise UserError("name a model with --model, or a server with --address")
    if flags.serve and (flags.address or flags.cluster or flags.model is None):
        raise UserError("--serve serves --model here: leave out --address and --cluster")
    config = with_benchmarks(evaluated_config(flags.model, overrides), flags.benchmarks)
    model = (
        local_model(Path(str(flags.model)), config)
        if flags.serve
        else chosen_model(flags.model, flags.address, config)
    )
    evaluation = skills_evaluation(
        config,
        model,
        flags.data_dir or default_data_folder(os.environ),
        environment,
        base=default_base(flags.model),
        out=flags.out,
        server_type=flags.server_type,
        address=flags.address,
        server_args=flags.server_args,
        tokenizer=flags.model,
        refinement=Refinement.of(flags.refine, flags.choose),
    )
    if flags.refine is not None:
        draft_prompts(evaluation)  # what it cannot do it says before anything is sampled
    if flags.cluster:
        return _on_cluster(flags, evaluation, overrides)
    if flags.dry_run:
        return _print_commands(evaluation, Place(out=str(evaluation.out.absolute())))
    complete = evaluate_here(evaluation, os.environ, small=flags.serve, again=flags.again)
    return DONE if complete else NO


def _parser() -> ScriptParser:
    parser = ScriptParser(__doc__, "evaluate.py [flags] [key=value ...]")
    add = parser.add_argument
    add("--model", metavar="PATH", help="model folder, checkpoint, or a name that the server knows")
    add("--out", type=Path, metavar="DIR", help="output folder (one of the setting's own)")
    add("--check", type=Path, metavar="DIR", help="read and print what DIR holds, run nothing")
    add("--dry-run", action="store_true", help="print setting and commands, evaluate nothing")
    for name, options in EVALUATION.items():
        add(name, **options)
    add("--serve", action="store_true", help="serve the model here: small ones")
    add("--server-type", default="vllm", help="NeMo-Skills' name for the server (vllm)")
    add("--cluster", metavar="NAME", help="a cluster profile of NeMo-Skills")
    add("--again", action="store_true", help="though jobs sent before may run")
    return parser


def _on_cluster(flags: argparse.Namespace, bare: SkillsEvaluation, overrides: Sequence[str]) -> int:
    config_dir = flags.config_dir or CHECKOUT / "configs" / "cluster_configs"
    profile = cluster_profile(flags.cluster, config_dir)
    site = with_site(bare.config, CHECKOUT, os.environ, overrides).igrpo.site
    if not flags.dry_run:
        profile.check_own()
    evaluation = next_round(bare)
    place = placed(evaluation, profile, site, flags.jobs)
    sent = submit(evaluation, place, os.environ, dry_run=flags.dry_run, again=flags.again)
    if flags.dry_run:
        return _print_commands(evaluation, place)
    if evaluation.out != bare.out:
        report(bare.out, bare.names)
    if not sent:
        return DONE if report(evaluation.out, evaluation.names) else NO
    print(f"sent as {place.expname}; once the jobs have ended, the same command checks the results")
    print(f"of {evaluation.out} and sends what is missing")
    return DONE


def _print_commands(evaluation: SkillsEvaluation, place: Place) -> int:
    print(evaluation.setting.to_json(), end="")
    for arguments in eval_commands(evaluation, evaluation.names, place):
        print(f"\n{shlex.join([evaluation.environment.ns, *arguments])}")
    return DONE


if __name__ == "__main__":
    sys.exit(exit_code(main))

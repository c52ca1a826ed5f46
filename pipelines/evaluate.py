"""Evaluates a model on the paper's benchmarks through NeMo-Skills' `ns eval`.

    evaluate.py --model PATH                                         with vLLM, on this machine
    evaluate.py --model NAME --address http://127.0.0.1:8000/v1      a server that runs
    evaluate.py --model PATH --cluster mine                          jobs that start their own
    evaluate.py --model runs/demo/checkpoints/step_00000100 --serve  a small model, served here
    evaluate.py --check DIR                                          only read what is there

Settings are `igrpo.evaluation` of the config: eval=all_64, igrpo.evaluation.profile=boxed, ...
Results are believed by their files alone. What is missing is said, and the same command completes
it; a folder that holds another setting is refused. docs/evaluation.md says more.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from igrpo_nemo.chain.script import DONE, NO, Parser, exit_code, overrides_of
from igrpo_nemo.cluster.site import site_profile
from igrpo_nemo.config import Config
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.model import (
    attention_heads,
    chosen_model,
    default_base,
    evaluated_config,
    local_model,
)
from igrpo_nemo.evaluation.results import inspected, results_of
from igrpo_nemo.evaluation.setting import default_folder, setting_of
from igrpo_nemo.evaluation.skills.benchmarks import with_benchmarks
from igrpo_nemo.evaluation.skills.cluster_yaml import sbatch_options
from igrpo_nemo.evaluation.skills.command import Place, Server, eval_commands, tensor_parallel
from igrpo_nemo.evaluation.skills.data import default_data_folder, read_benchmark
from igrpo_nemo.evaluation.skills.environment import (
    SkillsEnvironment,
    find_environment,
    version_warning,
)
from igrpo_nemo.evaluation.skills.evaluate import (
    SkillsEvaluation,
    complete_here,
    missing_text,
    results_text,
    with_vllm,
)
from igrpo_nemo.evaluation.skills.submit import cluster_profile, submit
from igrpo_nemo.evaluation.skills.vllm_server import find_vllm

CHECKOUT = Path(__file__).resolve().parents[1]


def main(words: Sequence[str]) -> int:
    flags, rest = _parser().parse_known_args(list(words))
    overrides = overrides_of(rest)
    if flags.check is not None:
        return _report(flags.check)
    environment = find_environment(os.environ)
    if warning := version_warning(environment):
        print(f"warning: {warning}", file=sys.stderr)
    if flags.demo:
        if flags.dry_run and not _has_demo(CHECKOUT / "runs"):
            print("there is no demo yet: a short one would be trained first, then evaluated")
            return DONE
        _choose_demo(flags)
    if flags.model is None and flags.address is None:
        raise UserError("name a model with --model, or a server with --address")
    vllm = None
    if flags.address is None and not (flags.serve or flags.cluster or flags.dry_run):
        vllm = find_vllm(os.environ) if flags.server_type == "vllm" else None
        if vllm is None:
            raise UserError(
                "nothing answers for the model, and no vllm is on PATH (or named by VLLM): give "
                "the --address of a running server, --serve for a small model, or --cluster"
            )
    config = evaluated_config(flags.model, overrides)
    config = with_benchmarks(config, flags.benchmarks)
    with ExitStack() as stack:
        if flags.serve and not flags.dry_run:
            flags.address = _served(stack, flags, config)
        evaluation = _evaluation(flags, config, environment)
        if flags.cluster:
            return _on_cluster(flags, evaluation, overrides)
        if flags.dry_run:
            return _print_commands(evaluation, Place(out=str(evaluation.out.absolute())))
        return _here(flags, evaluation, vllm)


def _parser() -> Parser:
    parser = Parser(__doc__, "evaluate.py [flags] [key=value ...]")
    add = parser.add_argument
    add("--model", metavar="PATH", help="model folder, checkpoint, or a name that the server knows")
    add("--demo", action="store_true", help="the demo's model on its held-out problems")
    add("--benchmarks", metavar="NAME[:K],...", help="these alone, K samples a problem")
    add("--data-dir", type=Path, metavar="DIR", help="prepared data (data/eval)")
    add("--out", type=Path, metavar="DIR", help="output folder (one of the setting's own)")
    add("--check", type=Path, metavar="DIR", help="read and print what DIR holds, run nothing")
    add("--dry-run", action="store_true", help="print setting and commands, evaluate nothing")
    where = parser.add_argument_group("what answers, and where")
    where.add_argument("--address", metavar="URL", help="an OpenAI-compatible server, up to /v1")
    where.add_argument("--serve", action="store_true", help="serve the model here: small ones")
    where.add_argument("--cluster", metavar="NAME", help="a cluster profile of NeMo-Skills")
    where.add_argument(
        "--config-dir", type=Path, metavar="DIR", help="its folder (configs/cluster_configs)"
    )
    where.add_argument("--jobs", type=int, default=8, help="jobs that share the samples (8)")
    where.add_argument("--server-type", default="vllm", help="NeMo-Skills' name for it (vllm)")
    where.add_argument("--server-args", default="", help="further arguments of the server")
    where.add_argument("--again", action="store_true", help="though jobs sent before may run")
    return parser


def _has_demo(runs: Path) -> bool:
    """Whether the demo can be evaluated as it is, without a training."""
    short = (runs / "demo_short" / "finished").is_file()
    return short or any((runs / "demo" / "checkpoints").glob("step_*"))


def _choose_demo(flags: argparse.Namespace) -> None:
    from igrpo_nemo.chain.evaluation import BENCHMARK, SAMPLES, prepare_demo

    demo = prepare_demo(CHECKOUT / "runs")
    flags.model, flags.data_dir, flags.serve = str(demo.checkpoint), demo.data, True
    flags.benchmarks = flags.benchmarks or f"{BENCHMARK}:{SAMPLES}"


def _served(stack: ExitStack, flags: argparse.Namespace, config: Config) -> str:
    """The address of the project's own small server, for as long as the evaluation takes."""
    from igrpo_nemo.evaluation.skills.serve import serving
    from igrpo_nemo.run import set_threads

    if flags.address or flags.cluster or flags.model is None:
        raise UserError("--serve serves --model here: leave out --address and --cluster")
    set_threads(config.igrpo.threads)
    folder = Path(local_model(Path(flags.model), config).name)
    template = config.policy.tokenizer.chat_template
    return stack.enter_context(
        serving(folder, precision=config.policy.precision, chat_template=template)
    )


def _evaluation(
    flags: argparse.Namespace, config: Config, environment: SkillsEnvironment
) -> SkillsEvaluation:
    """Model, data, setting and output folder, everything checked that can be before it starts."""
    model = chosen_model(flags.model, flags.address, config)
    data_dir = flags.data_dir or default_data_folder(os.environ)
    names = config.igrpo.evaluation.benchmarks
    data = tuple(read_benchmark(data_dir, name) for name in names)
    setting = setting_of(
        config, model, data, server_type=flags.server_type, nemo_skills=environment.version
    )
    out = flags.out or default_folder(default_base(flags.model), setting)
    heads = attention_heads(model.name, config)
    server = Server(
        model=model.name,
        server_type=flags.server_type,
        address=flags.address,
        gpus=tensor_parallel(config.igrpo.evaluation.server_gpus, heads),
        arguments=flags.server_args,
    )
    return SkillsEvaluation(config, setting, data, server, out, environment)


def _here(flags: argparse.Namespace, evaluation: SkillsEvaluation, vllm: str | None) -> int:
    serving = with_vllm(vllm, evaluation, os.environ) if vllm else None
    complete_here(evaluation, os.environ, again=flags.again, serving=serving)
    return _report(evaluation.out, evaluation.names)


def _on_cluster(
    flags: argparse.Namespace, evaluation: SkillsEvaluation, overrides: Sequence[str]
) -> int:
    config_dir = flags.config_dir or CHECKOUT / "configs" / "cluster_configs"
    profile = cluster_profile(flags.cluster, config_dir)
    site = site_profile(evaluation.config, CHECKOUT, os.environ, overrides)
    place = profile.place(evaluation.out, jobs=flags.jobs, sbatch=sbatch_options(site))
    if not flags.dry_run:
        profile.check_own()
    if flags.address is None:
        server = replace(evaluation.server, model=profile.seen(evaluation.server.model))
        evaluation = replace(evaluation, server=server)
    sent = submit(evaluation, place, os.environ, dry_run=flags.dry_run, again=flags.again)
    if sent is None:
        return _report(evaluation.out, evaluation.names)
    if flags.dry_run:
        return _print_commands(evaluation, place)
    print(f"sent as {place.expname}; once the jobs have ended, the same command checks the results")
    print(f"of {evaluation.out} and sends what is missing")
    return DONE


def _print_commands(evaluation: SkillsEvaluation, place: Place) -> int:
    import shlex

    print(evaluation.setting.to_json(), end="")
    for arguments in eval_commands(evaluation.setting, evaluation.names, evaluation.server, place):
        print(f"\n{shlex.join([str(evaluation.environment.ns), *arguments])}")
    return DONE


def _report(out: Path, benchmarks: Sequence[str] | None = None) -> int:
    """Prints the results of what is complete, then what is missing."""
    inspections = inspected(out, benchmarks)
    lacking = [one for one in inspections if one.missing]
    if len(lacking) < len(inspections):
        print(results_text(results_of(out, inspections)))
    if not lacking:
        return DONE
    print(missing_text(out, lacking), file=sys.stderr)
    return NO


if __name__ == "__main__":
    sys.exit(exit_code(main))

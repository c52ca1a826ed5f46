"""The `ns eval` commands of an evaluation: pure functions from a setting to argument lists.

    Setting + Place + Server --eval_commands--> [["eval", "--output_dir=...", ...], ...]

A call has one generation config and one number of tokens, so benchmarks that differ in either get
calls of their own; all of them write into the same folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.setting import Setting
from igrpo_nemo.evaluation.skills.benchmarks import benchmark_named
from igrpo_nemo.evaluation.skills.profiles import TEMPLATE_FILE, profile_arguments

_OWN_ARGUMENTS = {"vllm": ("--generation-config vllm",)}
"""vLLM would take what a request leaves open (top-k, a limit of tokens) from the model's
generation_config.json; its end-of-sequence ids it takes from there all the same
(vllm/config/model.py: try_get_generation_config, get_diff_sampling_param)."""


TAKES_TEMPLATE = ("vllm", "sglang")
"""Servers whose `--chat-template` is a file."""


@dataclass(frozen=True, slots=True)
class Server:
    """What answers: a server that runs at `address`, or one that is started on `gpus` GPUs."""

    model: str
    """The model's name at the server, or the path that the jobs' server loads."""
    server_type: str = "vllm"
    address: str | None = None
    gpus: int | None = None
    arguments: str = ""
    """Further arguments of a server that is started."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where it runs: this machine, or a NeMo-Skills cluster profile by name.

    `out` is the evaluation's folder as the jobs see it: inside a container a mount may have another
    name there.
    """

    out: str
    cluster: str | None = None
    config_dir: Path | None = None
    jobs: int = 8
    """Jobs that a cluster runs the samples in; each one starts a server."""
    expname: str = "eval"
    run_after: tuple[str, ...] = ()
    """Experiments of NeMo-Skills that come first; how they must end, the profile says."""
    after: tuple[int | str, ...] = ()
    """Slurm jobs that must succeed first."""
    sbatch: Mapping[str, str] = field(default_factory=dict)
    """Options of sbatch that a cluster profile has no key for: qos, constraint, reservation."""


def eval_commands(
    setting: Setting, benchmarks: Sequence[str], server: Server, place: Place
) -> list[list[str]]:
    """The arguments of `ns` for some of the setting's benchmarks."""
    calls: dict[tuple[str, int | None], list[str]] = {}
    for name in benchmarks:
        tokens = setting.problems[name]["tokens"]
        calls.setdefault((benchmark_named(name).kind, tokens), []).append(name)
    return [_eval_command(setting, names, server, place) for names in calls.values()]


def _eval_command(
    setting: Setting, names: Sequence[str], server: Server, place: Place
) -> list[str]:
    kind = benchmark_named(names[0]).kind
    tokens = setting.problems[names[0]]["tokens"]
    samples = ",".join(f"{name}:{setting.benchmarks[name]}" for name in names)
    return [
        "eval",
        f"--output_dir={place.out}",
        f"--data_dir={place.out}/data",
        f"--benchmarks={samples}",
        f"--expname={place.expname}",
        *_server_arguments(server, setting, place),
        *_place_arguments(place),
        *profile_arguments(setting.profile, kind, f"{place.out}/profile"),
        f"++inference.temperature={setting.temperature}",
        f"++inference.top_p={setting.top_p}",
        f"++inference.tokens_to_generate={'null' if tokens is None else tokens}",
    ]


def _server_arguments(server: Server, setting: Setting, place: Place) -> list[str]:
    arguments = [f"--model={server.model}", f"--server_type={server.server_type}"]
    if server.address is not None:
        return [*arguments, f"--server_address={server.address}"]
    arguments.append(f"--server_gpus={server.gpus}")
    text = started_arguments(server, setting, place.out)
    return [*arguments, f"--server_args={text}"] if text else arguments


def started_arguments(server: Server, setting: Setting, out: str) -> str:
    """The arguments of a server that is started for the evaluation, as a shell would read them.

    `out` is the evaluation's folder as the server sees it: the chat template of the config lies
    there. Raises `UserError` for a kind of server that is not known to take one.
    """
    own = [*_OWN_ARGUMENTS.get(server.server_type, ())]
    if setting.chat_template is not None:
        if server.server_type not in TAKES_TEMPLATE:
            raise UserError(
                "policy.tokenizer.chat_template cannot be given to a server of type "
                f"{server.server_type}: start one with that template and give its --address"
            )
        own.append(f"--chat-template {out}/profile/{TEMPLATE_FILE}")
    return " ".join(argument for argument in [*own, server.arguments] if argument)


def _place_arguments(place: Place) -> list[str]:
    if place.cluster is None:
        # Otherwise all samples start at once, a process of 300 MB each.
        return ["--single_node_mode=sequential"]
    arguments = [f"--cluster={place.cluster}", f"--num_jobs={place.jobs}"]
    if place.config_dir is not None:
        arguments.append(f"--config_dir={place.config_dir}")
    options = dict(place.sbatch)
    if place.after:
        numbers = ":".join(str(number) for number in place.after)
        options["dependency"] = f"afterok:{numbers}"
    # NeMo-Skills' jobs wait for each other too: behind one that failed they would for ever.
    options["kill_on_invalid_dep"] = "yes"
    arguments.append(f"--sbatch_kwargs={json.dumps(options)}")
    return [*arguments, *(f"--run_after={name}" for name in place.run_after)]


def tensor_parallel(gpus: int, attention_heads: int | None) -> int:
    """The GPUs that a server can split a model over: a power of two that divides its heads.

    Qwen2.5-7B has 28 heads: of eight GPUs it can use four.
    """
    if attention_heads is None:
        return gpus
    size = 1
    while size * 2 <= gpus and attention_heads % (size * 2) == 0:
        size *= 2
    return size


def mounted_path(path: Path, mounts: Sequence[str]) -> str:
    """A path of this machine as the containers see it. Raises `UserError` where no mount has it."""
    for mount in mounts:
        source, destination, *_ = mount.split(":")
        if path == Path(source) or Path(source) in path.parents:
            return str(Path(destination) / path.relative_to(source))
    known = ", ".join(mounts) or "it has none"
    raise UserError(
        f"{path} is in none of the cluster profile's mounts ({known}): "
        "use a folder that the containers see"
    )

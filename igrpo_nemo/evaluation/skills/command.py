r"""The `ns eval` commands of an evaluation, and the files that tell it how an answer is asked for.

    SkillsEvaluation + Place --eval_commands--> [["eval", "--output_dir=...", ...], ...]
    Config --write_profile--> OUT/profile/, which the commands name

A call has one generation config and one number of tokens, so benchmarks that differ in either get
calls of their own; all of them write into the same folder.

The profile `boxed` is NeMo-Skills' own way: its prompt for the benchmark, the last `\boxed{}`.
`answer_tags` is the training's: its system prompt, the bare problem as the user's message, the last
`<answer>...</answer>` outside the thinking. NeMo-Skills takes such a rule from a config file alone:
the benchmark's own arguments win over the file's prompt, and a shell would spoil the pattern.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from igrpo_nemo.config import Config
from igrpo_nemo.config.compose import builtin_config_dir
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.setting import TAKES_TEMPLATE, Setting
from igrpo_nemo.evaluation.skills.data import Kind, benchmark_named
from igrpo_nemo.run.tokenizer import chat_template_text

if TYPE_CHECKING:
    from igrpo_nemo.evaluation.skills.evaluate import SkillsEvaluation

CONFIG_NAMES: dict[Kind, str] = {"math": "answer_tags", "multichoice": "answer_tags_multichoice"}
OPENED_CONFIG_NAME = "answer_tags_opened"
"""In the place of `answer_tags` for models whose chat template opens the thinking."""
PROMPT_FILE = "prompt.yaml"
TEMPLATE_FILE = "chat_template.jinja"

OWN_ARGUMENTS = "--generation-config vllm"
"""vLLM would take what a request leaves open (top-k, a limit of tokens) from the model's
generation_config.json; its end-of-sequence ids it takes from there all the same
(vllm/config/model.py: try_get_generation_config, get_diff_sampling_param)."""

_BOXED = "defaults:\n  - base_generation_config\n  - _self_\n"


@dataclass(frozen=True, slots=True)
class Place:
    """Where it runs: this machine, or a NeMo-Skills cluster profile by name.

    `out` is the evaluation's folder as the jobs see it, and `model` the model's where that is
    another one than here: inside a container a mount may have another name.
    """

    out: str
    model: str | None = None
    cluster: str | None = None
    config_dir: Path | None = None
    jobs: int = 8
    """Jobs that a cluster runs the samples in; each one starts a server."""
    expname: str = "eval"
    after: tuple[int | str, ...] = ()
    """Slurm jobs that must succeed first."""
    sbatch: Mapping[str, str] = field(default_factory=dict)
    """Options of sbatch that a cluster profile has no key for: qos, constraint, reservation."""


def eval_commands(
    evaluation: SkillsEvaluation, benchmarks: Sequence[str], place: Place
) -> list[list[str]]:
    """The arguments of `ns` for some of the evaluation's benchmarks.

    Raises `UserError` for a server that is not known to take the config's chat template.
    """
    setting = evaluation.setting
    calls: dict[tuple[Kind, int | None], list[str]] = {}
    for name in benchmarks:
        tokens = setting.problems[name]["tokens"]
        calls.setdefault((benchmark_named(name).kind, tokens), []).append(name)
    if evaluation.address is not None:
        answers = [f"--server_address={evaluation.address}"]
    else:
        text = started_arguments(evaluation, place.out)
        answers = [f"--server_gpus={evaluation.gpus}", *([f"--server_args={text}"] if text else [])]
    return [
        [
            "eval",
            f"--output_dir={place.out}",
            f"--data_dir={place.out}/data",
            f"--benchmarks={','.join(f'{name}:{setting.benchmarks[name]}' for name in names)}",
            f"--expname={place.expname}",
            *(f"--model={place.model or setting.model}", f"--server_type={setting.server_type}"),
            *answers,
            *_place_arguments(place),
            *_profile_arguments(setting, kind, f"{place.out}/profile"),
            f"++inference.temperature={setting.temperature}",
            f"++inference.top_p={setting.top_p}",
            f"++inference.tokens_to_generate={'null' if tokens is None else tokens}",
        ]
        for (kind, tokens), names in calls.items()
    ]


def started_arguments(evaluation: SkillsEvaluation, out: str) -> str:
    """The arguments of a server that is started for the evaluation, as a shell would read them;
    `out` is the evaluation's folder as the server sees it."""
    server_type = evaluation.setting.server_type
    own = [OWN_ARGUMENTS] if server_type == "vllm" else []
    if evaluation.setting.chat_template is not None:
        if server_type not in TAKES_TEMPLATE:
            raise UserError(
                "policy.tokenizer.chat_template cannot be given to a server of type "
                f"{server_type}: start one with that template and give its --address"
            )
        own.append(f"--chat-template {out}/profile/{TEMPLATE_FILE}")
    return " ".join(argument for argument in [*own, evaluation.server_args] if argument)


def _place_arguments(place: Place) -> list[str]:
    if place.cluster is None:
        # Otherwise all samples start at once, a process of 300 MB each.
        return ["--single_node_mode=sequential"]
    options = dict(place.sbatch)
    if place.after:
        options["dependency"] = f"afterok:{':'.join(map(str, place.after))}"
    # NeMo-Skills' jobs wait for each other too: behind one that failed they would for ever.
    options["kill_on_invalid_dep"] = "yes"
    return [
        f"--cluster={place.cluster}",
        f"--num_jobs={place.jobs}",
        *([f"--config_dir={place.config_dir}"] if place.config_dir is not None else []),
        f"--sbatch_kwargs={json.dumps(options)}",
    ]


def _profile_arguments(setting: Setting, kind: Kind, folder: str) -> list[str]:
    """`folder` is `write_profile`'s, as the job sees it."""
    path = f"--config-path={folder}"
    if setting.profile == "boxed":
        return [path, "--config-name=boxed"] if setting.chat_template_kwargs else []
    prompt = f"++prompt_config={folder}/{PROMPT_FILE}"
    return [path, f"--config-name={CONFIG_NAMES[kind]}", prompt]


def generation_config_dir() -> Path:
    return builtin_config_dir() / "skills"


def write_profile(
    config: Config, out: Path, *, thinking_open: bool = False, refined: bool = False
) -> Path:
    """What the profiles and a server need, in the evaluation's folder, where every node reads it.

    The files have the same names for every model; multiple choice builds upon `answer_tags`.
    """
    folder = out / "profile"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, sources = config.policy.tokenizer, {name: name for name in CONFIG_NAMES.values()}
    if thinking_open:
        sources[CONFIG_NAMES["math"]] = OPENED_CONFIG_NAME
    texts = {
        f"{name}.yaml": (generation_config_dir() / f"{source}.yaml").read_text()
        for name, source in sources.items()
    }
    if kwargs := tokenizer.chat_template_kwargs:
        # In a file: NeMo-Skills' own command line is a shell's.
        given = yaml.safe_dump({"chat_template_kwargs": kwargs}, allow_unicode=True)
        texts = {name: text + given for name, text in {**texts, "boxed.yaml": _BOXED}.items()}
    texts[PROMPT_FILE] = prompt_text(config.igrpo.prompt.system, refined=refined)
    if template := chat_template_text(tokenizer.chat_template):
        texts[TEMPLATE_FILE] = template
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def prompt_text(system: str, *, refined: bool = False) -> str:
    """A NeMo-Skills prompt: the system prompt, which it sends as it is, then the bare problem, and
    behind it the draft of a refined answer. Braces in a row's text stay braces."""
    prompt = {"user": "{problem}{draft}" if refined else "{problem}"}
    if system:
        prompt["system"] = system
    return yaml.safe_dump(prompt, allow_unicode=True, width=100)


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

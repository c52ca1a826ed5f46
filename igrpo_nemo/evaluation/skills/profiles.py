r"""How the answer is asked for and found: `answer_tags` and `boxed`.

`boxed` is NeMo-Skills' own way: its prompt for the benchmark, the last `\boxed{}`. `answer_tags` is
the training's: its system prompt, the bare problem as the user's message, the last
`<answer>...</answer>` outside the thinking. NeMo-Skills takes such a rule from a config file alone:
the benchmark's own arguments win over the file's prompt, and a shell would spoil the pattern.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import yaml

from igrpo_nemo.config import Config
from igrpo_nemo.config.compose import builtin_config_dir
from igrpo_nemo.evaluation.skills.benchmarks import Kind
from igrpo_nemo.run.chat_template import chat_template_text

CONFIG_NAMES: dict[Kind, str] = {"math": "answer_tags", "multichoice": "answer_tags_multichoice"}
OPENED_CONFIG_NAME = "answer_tags_opened"
"""In the place of `answer_tags` for models whose chat template opens the thinking."""
PROMPT_FILE = "prompt.yaml"
TEMPLATE_FILE = "chat_template.jinja"


def generation_config_dir() -> Path:
    """The folder of the shipped generation configs, for `ns eval --config-path`."""
    return builtin_config_dir() / "skills"


def answer_pattern(*, thinking_open: bool = False) -> re.Pattern[str]:
    """The pattern that finds an answer in a reply, as NeMo-Skills applies it."""
    path = generation_config_dir() / _source("math", thinking_open)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return re.compile(values["eval_config"]["extract_regex"])


def prompt_text(system: str) -> str:
    """A NeMo-Skills prompt: the system prompt, then the bare problem.

    NeMo-Skills formats both texts, so braces are doubled.
    """
    prompt = {"user": "{problem}"}
    if system:
        prompt["system"] = system.replace("{", "{{").replace("}", "}}")
    return yaml.safe_dump(prompt, allow_unicode=True, width=100)


def write_profile(config: Config, out: Path, *, thinking_open: bool = False) -> Path:
    """What `answer_tags` and a server need, in the evaluation's folder, where every node reads it.

    The files have the same names for every model; multiple choice builds upon `answer_tags`.
    """
    folder = out / "profile"
    folder.mkdir(parents=True, exist_ok=True)
    for kind, name in CONFIG_NAMES.items():
        source = generation_config_dir() / _source(kind, thinking_open)
        shutil.copyfile(source, folder / f"{name}.yaml")
    (folder / PROMPT_FILE).write_text(prompt_text(config.igrpo.prompt.system), encoding="utf-8")
    if template := chat_template_text(config.policy.tokenizer.chat_template):
        (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    return folder


def _source(kind: Kind, thinking_open: bool) -> str:
    opened = kind == "math" and thinking_open
    return f"{OPENED_CONFIG_NAME if opened else CONFIG_NAMES[kind]}.yaml"


def profile_arguments(profile: str, kind: Kind, folder: str) -> list[str]:
    """The profile's part of `ns eval`. `folder` is `write_profile`'s, as the job sees it."""
    if profile == "boxed":
        return []
    return [
        f"--config-path={folder}",
        f"--config-name={CONFIG_NAMES[kind]}",
        f"++prompt_config={folder}/{PROMPT_FILE}",
    ]

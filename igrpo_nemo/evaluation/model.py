"""What is evaluated: its config, its weights, its context, and where its evaluations lie.

--model PATH | NAME, --address --chosen_model--> Model
a checkpoint of a run carries its config: the prompt it was trained with
"""

from __future__ import annotations

import json
import os
import re
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from igrpo_nemo.config import Config, load_config
from igrpo_nemo.config.compose import quoted
from igrpo_nemo.errors import UserError
from igrpo_nemo.files import model_folder as hub_folder
from igrpo_nemo.run import config_of_model
from igrpo_nemo.run.identity import weights_fingerprint
from igrpo_nemo.run.tokenizer import chat_template_text, stored_chat_template

_PLAIN_PATH = re.compile(r"[A-Za-z0-9._/+-]+")


@dataclass(frozen=True, slots=True)
class Model:
    """What is evaluated: a name or path, what identifies its weights, its context in tokens,
    whether its chat template opens the thinking, and its attention heads."""

    name: str
    weights: str
    context: int | None
    thinking_open: bool = False
    heads: int | None = None


def evaluated_config(model: str | None, overrides: Sequence[str]) -> Config:
    """The config that a model is evaluated under: its run's own prompt, else the overrides alone.

    A run's config is composed already, so `eval=NAME` and its keys are read on their own there.
    `cluster=NAME` says which machines, for an engine that evaluates nothing: so is it.
    """

    def picked(*starts: str) -> list[str]:
        return [word for word in overrides if word.lstrip("+~").startswith(starts)]

    served = "policy.model_name=served"
    clusters, groups = picked("cluster="), picked("eval=")
    words = [word for word in overrides if word not in clusters]
    if model is None or not Path(model).exists():
        config = load_config([f"policy.model_name={quoted(model or 'served')}", *words])
    else:
        config = config_of_model(Path(model), [word for word in words if word not in groups])
        if groups:
            chosen = load_config([served, *picked("eval=", "igrpo.evaluation.")])
            config = config.replaced("igrpo", evaluation=chosen.igrpo.evaluation)
    if clusters:
        chosen = load_config(["engine=nemo_rl", served, *picked("cluster=", "igrpo.site.")])
        config = config.replaced("igrpo", site=chosen.igrpo.site)
    return config


def model_folder(path: Path) -> Path:
    """The Hugging Face folder meant by a path: itself, or the `model/` of a checkpoint."""
    inner = path / "model"
    return inner if not (path / "config.json").is_file() and inner.is_dir() else path


def default_base(model: str | None) -> Path:
    """`RUN/evaluation/step_N` for a checkpoint of a run, else `evaluation/NAME` right here."""
    path = Path(model or "served").absolute()
    for parent in path.parents:
        if parent.name == "checkpoints":
            return parent.parent / "evaluation" / path.relative_to(parent).parts[0]
    return Path("evaluation") / path.name


def chosen_model(model: str | None, address: str | None, config: Config) -> Model:
    """The model: a folder's, a name's, or the one of a running server.

    With a server, its name is one that the server knows. Raises `UserError` where nothing answers
    or the server has other models.
    """
    if address is None:
        assert model is not None
        is_path = Path(model).exists() or model.startswith((".", "/", "~"))
        return local_model(Path(model), config) if is_path else named_model(model, config)
    by_name = _served_models(address)
    if not by_name and model is None:
        raise UserError(f"the server at {address} lists no models: name one with --model")
    if not by_name:
        return named_model(str(model), config)
    local = local_model(Path(model), config) if model and Path(model).is_dir() else None
    names = [model, local.name if local else None] if model else list(by_name)
    name = next((name for name in names if name in by_name), None)
    if name is None:
        raise UserError(f"the server at {address} serves {', '.join(by_name)}, not {model}")
    context = by_name[name].get("max_model_len")
    if local is not None:
        return replace(local, name=name, context=context or local.context)
    return named_model(name, config, context)


def local_model(path: Path, config: Config) -> Model:
    """The model of a Hugging Face folder, or of a checkpoint that holds one in `model/`."""
    folder = model_folder(path).absolute()
    if (values := shape(folder)) is None:
        raise UserError(f"{path} is no model folder: it has no config.json (nor model/config.json)")
    weights, opened = weights_fingerprint(folder), opens_thinking(folder, config)
    return Model(plain_path(folder), weights, thinking_open=opened, **facts(values, config))


def named_model(name: str, config: Config, context: int | None = None) -> Model:
    """A model that a server has or loads under a name; `context` is what the server says."""
    known = facts({}, config)
    known["context"] = context or known["context"]
    return Model(name, name, thinking_open=opens_thinking(name, config), **known)


def shape(folder: Path) -> dict[str, Any] | None:
    """The config.json of a model's folder, None where there is none."""
    file = folder / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def facts(values: Mapping[str, Any], config: Config) -> dict[str, int | None]:
    """Context and heads of a `Model`: of its config.json, else of `igrpo.architecture`."""
    names = {"context": "max_position_embeddings", "heads": "num_attention_heads"}
    described = config.igrpo.architecture
    return {fact: values.get(key) or getattr(described, key, None) for fact, key in names.items()}


def opens_thinking(model: str | Path, config: Config, *, hf_home: str | None = None) -> bool:
    """Whether the prompt of a model ends with `<think>`, as a server renders it: its replies then
    begin inside a thinking part.

    `model` is a folder, or a name on the hub whose files are in the cache of `hf_home` (default:
    `igrpo.site.hf_home`) or in the default one; False for one that is not here. The config's chat
    template stands in the place of the model's own.
    """
    folder = cached_folder(model, hf_home or config.igrpo.site.hf_home)
    keys = config.policy.tokenizer
    template = chat_template_text(keys.chat_template)
    # Spares the import of transformers.
    if folder is None or "think" not in (template or stored_chat_template(folder) or ""):
        return False
    from igrpo_nemo.prompts import PromptBuilder, PromptProfile, TokenBudget
    from igrpo_nemo.run.tokenizer import load_tokenizer

    try:  # boundary: files of others; what is wrong with them, their server says
        return PromptBuilder(
            load_tokenizer(folder, keys.chat_template),
            PromptProfile(config.igrpo.prompt.system, "", "draft"),
            TokenBudget(2, 1),
            chat_template_kwargs=keys.chat_template_kwargs,
        ).thinking_open
    except UserError:
        return False


def plain_path(path: Path) -> str:
    """The path as text. Raises `UserError` for one that NeMo-Skills' unquoted commands break at."""
    if not _PLAIN_PATH.fullmatch(str(path)):
        raise UserError(
            f"{path}: NeMo-Skills does not quote paths, use one of letters, digits and . _ / + -"
        )
    return str(path)


def cached_folder(
    model: str | Path, hf_home: str | None, file: str = "tokenizer_config.json"
) -> Path | None:
    """A model's folder, or the one with `file` in Hugging Face's cache: that of `hf_home`, or this
    shell's; None where it is not here."""
    if Path(model).is_dir():
        return Path(model)
    caches = [{"HF_HOME": hf_home}] if hf_home else []
    found = (hub_folder(str(model), each, file) for each in (*caches, os.environ))
    return next(filter(None, found), None)


def open_models(address: str, timeout: float) -> Any:
    """The reply to the question for a server's models. A proxy would answer for a dead server."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(f"{address.rstrip('/')}/models", timeout=timeout)


def _served_models(address: str) -> dict[str, dict[str, Any]]:
    """Name -> what a server says of a model; none of one that has no such list."""
    try:  # boundary: a server of somebody's
        with open_models(address, timeout=10) as reply:
            return {str(one.get("id")): one for one in json.load(reply)["data"]}
    except urllib.request.HTTPError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"no server answers at {address} ({error}): start it, or give another --address"
        ) from error

"""From a command line's words to what is evaluated: config, benchmarks, model, output folder."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from igrpo_nemo.config import Config, load_config
from igrpo_nemo.config.compose import quoted
from igrpo_nemo.config.igrpo_keys import Evaluation
from igrpo_nemo.errors import UserError
from igrpo_nemo.evaluation.setting import Model, local_model, named_model

DEFAULT_SAMPLES = 8
ANSWER_TIMEOUT_S = 10


def config_of_model(model: str | None, overrides: Sequence[str]) -> Config:
    """The config that a model is evaluated under: its run's own prompt, else the overrides alone.

    A run's config is composed already, so `eval=NAME` and its keys are read on their own there.
    `cluster=NAME` says which machines, for an engine that evaluates nothing: so is it.
    """
    clusters = [word for word in overrides if word.lstrip("+").startswith("cluster=")]
    if clusters:
        config = config_of_model(model, [word for word in overrides if word not in clusters])
        site = [word for word in overrides if word.lstrip("+~").startswith("igrpo.site.")]
        chosen = load_config(["engine=nemo_rl", "policy.model_name=served", *clusters, *site])
        return config.replaced("igrpo", site=chosen.igrpo.site)
    return _config_of_model(model, overrides)


def _config_of_model(model: str | None, overrides: Sequence[str]) -> Config:
    from igrpo_nemo.run import config_of_model

    if model is None or not Path(model).exists():
        return load_config([f"policy.model_name={quoted(model or 'served')}", *overrides])
    groups = [word for word in overrides if word.lstrip("+").startswith("eval=")]
    others = [word for word in overrides if word not in groups]
    config = config_of_model(Path(model), others)
    if not groups:
        return config
    keys = [word for word in others if word.lstrip("+~").startswith("igrpo.evaluation.")]
    chosen = load_config(["policy.model_name=served", *groups, *keys])
    return config.replaced("igrpo", evaluation=chosen.igrpo.evaluation)


def with_benchmarks(config: Config, text: str | None) -> Config:
    """The config with the benchmarks of `--benchmarks aime24:64,gsm8k` alone.

    Without a number a benchmark keeps the config's, or gets eight samples.
    """
    if text is None:
        return config
    keys = config.igrpo.evaluation
    chosen: dict[str, int] = {}
    for word in text.split(","):
        name, colon, samples = word.strip().partition(":")
        if colon and not (samples.isdecimal() and int(samples) > 0):
            raise UserError(f"--benchmarks {word}: write NAME or NAME:K with K of 1 or more")
        chosen[name] = int(samples) if colon else keys.benchmarks.get(name, DEFAULT_SAMPLES)
    try:
        checked = Evaluation.model_validate({**keys.model_dump(), "benchmarks": chosen})
    except ValueError as error:
        raise UserError(f"--benchmarks {text}: no benchmark has such a name") from error
    return config.replaced("igrpo", evaluation=checked)


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
        return local_model(Path(model), config) if _is_path(model) else named_model(model, config)
    served = _served_models(address)
    if not served:
        if model is None:
            raise UserError(f"the server at {address} lists no models: name one with --model")
        return named_model(model, config)
    by_name = {str(one.get("id")): one for one in served}
    local = local_model(Path(model), config) if model and Path(model).is_dir() else None
    names = [model, local.name if local else None] if model else list(by_name)
    name = next((name for name in names if name in by_name), None)
    if name is None:
        raise UserError(f"the server at {address} serves {', '.join(by_name)}, not {model}")
    context = by_name[name].get("max_model_len")
    if local is not None:
        return replace(local, name=name, context=context or local.context)
    return named_model(name, config, context)


def attention_heads(model: str, config: Config) -> int | None:
    """The heads that a server splits over its GPUs; None where the model's shape is not known."""
    file = Path(model) / "config.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8")).get("num_attention_heads")
    architecture = config.igrpo.architecture
    return architecture.num_attention_heads if architecture else None


def _is_path(model: str) -> bool:
    return Path(model).exists() or model.startswith((".", "/", "~"))


def _served_models(address: str) -> list[dict[str, Any]]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:  # boundary: a server of somebody's
        with opener.open(f"{address.rstrip('/')}/models", timeout=ANSWER_TIMEOUT_S) as reply:
            return list(json.load(reply)["data"])
    except urllib.request.HTTPError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"no server answers at {address} ({error}): start it, or give another --address"
        ) from error

"""Configurations as they may be written down: plain data, without secrets.

    Mapping | DictConfig | pydantic model -> plain_config -> scrub -> YAML, wandb, MLflow
    nested mappings -> flat -> (dotted name, value), to compare two or to list one

A word of the key decides (`wandb_api_key`, `HF_TOKEN`, `password`); keys that only sound alike
(`max_new_tokens`, `pad_token`, `input_key`) keep their values, for a run is reproduced from them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

REDACTED = "<redacted>"

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_ALWAYS = re.compile(r"secret|passw(or)?d|passphrase|credential|api_?key|private_?key", re.I)
_OFTEN = re.compile(r"[a-z]*(key|token)s?")
_HOLDERS = set("access auth bearer client hf hub refresh session wandb".split())
_NOT_SECRET_TOKEN = set(
    "bos cls eos image mask max min num number pad padding sep special start stop think thinking"
    " unk new added extra per batch total context train".split()
)
_NOT_SECRET_KEY = set(
    "input output prompt question answer problem solution expected messages message chat text"
    " system user image video audio metric sort group id reward label target chosen rejected"
    " reference data dataset column field train val task".split()
)
_IN_VALUES = (
    (re.compile(r"(://)[^/@\s]+@"), rf"\1{REDACTED}@"),
    (re.compile(r"\b(hf_|ghp_|github_pat_|sk-|nvapi-|glpat-)[A-Za-z0-9_\-]{16,}"), REDACTED),
    (re.compile(r"\bAKIA[A-Z0-9]{16}\b"), REDACTED),
)
_ASSIGNED = re.compile(r"([A-Za-z][\w-]*)(['\"]?\s?[=:]\s?['\"]?)([^\s'\",;]+)")
_BEARER = re.compile(r"(\bbearer\s+)[^\s'\"]+", re.I)
_SHORTEST = 8
"""Values of fewer characters are switches: striking them out would maim a text."""


def plain_config(config: object) -> object:
    """Nested dicts, lists and scalars of a mapping, an OmegaConf node or a pydantic model."""
    dump = getattr(config, "model_dump", None)
    if callable(dump):
        return dump(mode="json")
    if type(config).__module__.startswith("omegaconf"):
        from omegaconf import OmegaConf

        return plain_config(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
    if isinstance(config, Mapping):
        return {str(key): plain_config(value) for key, value in config.items()}
    if isinstance(config, Sequence) and not isinstance(config, (str, bytes)):
        return [plain_config(value) for value in config]
    if config is None or isinstance(config, (bool, int, float, str)):
        return config.value if hasattr(config, "value") else config  # type: ignore[union-attr]
    return str(config)


def flat(node: object, path: str = "") -> Iterator[tuple[str, object]]:
    """(dotted name, value) of the leaves of nested mappings; an empty mapping is a leaf."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from flat(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def scrub(config: object) -> object:
    """A plain copy of `config` whose secret values read `<redacted>`.

    Beside values under telling keys: credentials inside URLs, and well-known token formats
    wherever they stand. None and booleans stay, they give nothing away.
    """
    return _scrub(plain_config(config), suspicion=0)


def scrub_text(text: str, environ: Mapping[str, str]) -> str:
    """A log's text without secrets: the values of the secret variables of `environ`, what is
    assigned to a telling name (`HF_TOKEN=...`), and well-known token formats."""
    for name, value in environ.items():
        if len(value) >= _SHORTEST and _names_secret(name):
            text = text.replace(value, REDACTED)

    def without_value(match: re.Match[str]) -> str:
        hide = _names_secret(match[1]) and not match[3].replace(".", "").isdecimal()
        return f"{match[1]}{match[2]}{REDACTED}" if hide else match[0]

    text = _BEARER.sub(rf"\1{REDACTED}", text)
    for pattern, replacement in _IN_VALUES:
        text = pattern.sub(replacement, text)
    return _ASSIGNED.sub(without_value, text)


def _names_secret(name: str) -> bool:
    """Whether a variable holds a secret: the name of a file that holds one gives nothing away."""
    return _suspicion(name) > 0 and not name.upper().endswith(("_PATH", "_FILE"))


def _scrub(value: object, suspicion: int) -> object:
    if isinstance(value, dict):
        return {k: _scrub(v, max(suspicion, _suspicion(k))) for k, v in value.items()}
    if isinstance(value, list):
        return [_scrub(item, suspicion) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if suspicion == 2 or (suspicion == 1 and isinstance(value, str) and value):
        return REDACTED
    if isinstance(value, str):
        for pattern, replacement in _IN_VALUES:
            value = pattern.sub(replacement, value)
    return value


def _suspicion(key: str) -> int:
    """2: every value under this key is secret; 1: every text is (a number is a count); 0: none.

    `token` and `key` name a secret when they end the key (`hf_token`), unless the word before says
    otherwise (`pad_token`, `input_key`); inside a key they seldom do (`moe_token_dispatcher_type`).
    """
    if _ALWAYS.search(key):
        return 2
    words = [word.lower() for word in _WORD.findall(key) if not word.isdigit()]
    if words and words[-1] == "env":
        return 0  # the name of an environment variable, not what it holds
    for position, word in enumerate(words):
        if not _OFTEN.fullmatch(word):
            continue
        harmless = _NOT_SECRET_KEY if word.rstrip("s").endswith("key") else _NOT_SECRET_TOKEN
        before = set(words[max(0, position - 1) : position])
        last = position == len(words) - 1 or words[-1] == "value"
        if (last and not before & harmless) or before & _HOLDERS:
            return 1
    return 0

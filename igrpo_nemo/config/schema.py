"""The root of the typed config tree, what is wrong with plain values, and the tree as dotted keys.

    plain values --validated--> Config | a line that says what works
    Config --all_keys--> `igrpo keys`, and messages about keys that nobody knows or reads

A run folder of an earlier version names every key: a gone key with a value that changed nothing is
left out of what is read, with any other it is refused.
"""

from __future__ import annotations

import copy
import difflib
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from igrpo_nemo.config import nemo_keys as nemo
from igrpo_nemo.config.igrpo_keys import IGRPO, LOCAL_ONLY
from igrpo_nemo.config.nemo_schema import nemo_schema
from igrpo_nemo.config.section import HostSection, Section, at
from igrpo_nemo.errors import UserError
from igrpo_nemo.feedback import Feedback, feedback_class
from igrpo_nemo.files.scrub import scrub

SHOWN_PROBLEMS = 3
"""A message names no more problems than this and counts the others."""

GONE: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("gone_keys.yaml").read_text(encoding="utf-8")
)
"""Keys that earlier versions knew."""


class Config(HostSection):
    """A resolved run: NeMo-RL's sections and `igrpo`. Frozen; `derive` returns changed copies."""

    igrpo: IGRPO
    """The two stages."""
    grpo: nemo.GRPO
    """The loop."""
    loss_fn: nemo.Loss
    """The objective."""
    policy: nemo.Policy
    """Model, optimizer, sampling."""
    data: nemo.Data
    """The problems."""
    env: nemo.Env
    """Environments."""
    checkpointing: nemo.Checkpointing
    """Checkpoints."""
    logger: nemo.Logger
    """Run folder and loggers."""
    cluster: nemo.Cluster
    """Machines."""

    data_plane: nemo.Only[nemo.Open] = nemo.only("NeMo-RL's transfer queue.")
    on_policy_distillation: nemo.Only[nemo.Open] = nemo.only("NeMo-RL's on-policy distillation.")

    @property
    def feedback(self) -> Feedback:
        """`igrpo.feedback` with its options: what Stage 2 sees, which rows are trained."""
        return feedback_class(self.igrpo.feedback).of(self.igrpo, self.grpo.seed)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under NeMo-RL's keys and `igrpo`; optional keys nobody set are absent."""
        return self.model_dump()

    def to_yaml(self) -> str:
        """The same as YAML, which `read_config` takes back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)

    def replaced(self, section: str, **values: Any) -> Config:
        """A copy with other values in a section (a dotted path); the values are not checked."""
        return _replaced(self, section.split("."), values)


def _replaced(node: Any, path: list[str], values: dict[str, Any]) -> Any:
    if not path:
        return node.model_copy(update=values)
    child = _replaced(getattr(node, path[0]), path[1:], values)
    return node.model_copy(update={path[0]: child})


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the config with its one-line description; `section` where it holds further keys.

    `choices` are the words that it takes, none where any value of its type will do. `default` is
    the schema's, None where it has none.
    """

    path: str
    description: str
    section: type[Section] | None
    choices: tuple[str, ...] = ()
    default: Any = None


def all_keys(section: type[Section] = Config, prefix: str = "") -> Iterator[Key]:
    """Every key below a section, depth first, in the order of the schema."""
    for name, field in section.model_fields.items():
        child = section_of(field)
        default = None if field.is_required() else field.default
        yield Key(
            prefix + name,
            field.description or "",
            child,
            tuple(_choices(field.annotation)),
            None if child is not None or default is PydanticUndefined else default,
        )
        if child is not None:
            yield from all_keys(child, f"{prefix}{name}.")


def nearest_key(path: str, extra: Iterable[str] = ()) -> str | None:
    """The known key that an unknown dotted one most probably meant; None where none is like it.

    A sibling spelled alike comes first, then a key of the same last name in another section, then
    a last name that is spelled alike. `extra` are further names: the config groups, NeMo-RL's own.
    """
    known = list(dict.fromkeys([*(key.path for key in all_keys()), *sorted(extra)]))
    parent, _, leaf = path.rpartition(".")
    siblings = [k for k in known if k.rpartition(".")[0] == parent]
    if close := _close(leaf, [_leaf(k) for k in siblings], cutoff=0.6):
        return f"{parent}.{close}" if parent else close
    if namesakes := [k for k in known if _leaf(k) == leaf]:
        return _close(path, namesakes, cutoff=0.0)
    if close := _close(leaf, [_leaf(k) for k in known], cutoff=0.75):
        return next(k for k in known if _leaf(k) == close)
    return None if siblings else _close(path, known, cutoff=0.75)


def _close(word: str, candidates: list[str], cutoff: float) -> str | None:
    return next(iter(difflib.get_close_matches(word, candidates, n=1, cutoff=cutoff)), None)


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds, None where it holds a value."""
    parts = [field.annotation]
    for part in parts:  # Those of a union, or of `Annotated`, are appended.
        if isinstance(part, type) and issubclass(part, Section):
            return part
        if typing.get_origin(part) is not list:
            parts += typing.get_args(part)
    return None


def _choices(annotation: Any) -> Iterator[str]:
    """The words of a `Literal`, also of one in a list or beside null."""
    if typing.get_origin(annotation) is typing.Literal:
        yield from typing.get_args(annotation)
        return
    for part in typing.get_args(annotation):
        yield from _choices(part)


def unread(config: Config) -> list[str]:
    """The keys whose value is not the default and that the config's engine does not read."""
    mark = nemo.NEMO_ONLY if config.igrpo.engine == "local" else LOCAL_ONLY
    generation = config.policy.generation
    # The embedded engine reads these where it samples with vLLM.
    vllm = ("vllm_cfg", "vllm_kwargs") if generation.backend == "vllm" else ()
    read = {f"policy.generation.{name}" for name in vllm}
    newer = newer_keys(config) if config.igrpo.engine == "local" else ()
    return sorted({*_unread(config, "", mark), *newer} - read)


def newer_keys(section: Section, prefix: str = "") -> Iterator[str]:
    """The keys that only a NeMo-RL newer than 0.7.0 can have, or nobody has."""
    yield from (prefix + name for name in section.model_extra or ())
    for name in type(section).model_fields:
        if isinstance(child := getattr(section, name), Section):
            yield from newer_keys(child, f"{prefix}{name}.")


def _unread(section: Section, prefix: str, mark: object) -> Iterator[str]:
    for name in section.model_fields_set & type(section).model_fields.keys():
        value, field = getattr(section, name), type(section).model_fields[name]
        if isinstance(value, Section):
            yield from _unread(value, f"{prefix}{name}.", mark)
        elif mark in field.metadata and value not in (None, False, field.default):
            yield prefix + name


def validated(
    values: Mapping[str, Any],
    groups: Iterable[str] = (),
    default: Callable[[str], Any] = lambda path: None,
) -> Config:
    """The typed config of plain nested values; nothing is derived yet.

    Raises `UserError` naming every unknown key (with the nearest known one), missing key and wrong
    value by its dotted path, in one line. `groups` are names of config groups, which an unknown key
    at the root may have meant; `default` knows what a key holds where nobody overrides it.
    """
    try:
        config = Config.model_validate(without_gone(values))
        unknown = [path for path in newer_keys(config) if path not in nemo_schema().newer]
        if not unknown:
            return config
        problems = [_unknown(path, groups) for path in unknown]
    except ValidationError as error:
        problems = [_describe(problem, groups, default) for problem in error.errors()]
    shown = "; ".join(problems[:SHOWN_PROBLEMS])
    more = len(problems) - SHOWN_PROBLEMS
    raise UserError(f"{shown}; and {more} more" if more > 0 else shown)


def without_gone(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of plain values without the gone keys that changed nothing."""
    kept = copy.deepcopy(dict(values))
    for path, gone in GONE.items():
        parent, _, leaf = path.rpartition(".")
        section = at(kept, parent)
        if isinstance(section, dict) and leaf in section and section[leaf] in gone["unused"]:
            del section[leaf]
    return kept


def _describe(problem: Any, groups: Iterable[str], default: Callable[[str], Any]) -> str:
    path = ".".join(str(part) for part in problem["loc"] if part not in nemo.TAGS)
    if problem["type"] == "extra_forbidden":
        gone = next((key for key in GONE if f"{path}.".startswith(f"{key}.")), None)
        if gone is not None:
            return f"{gone} is gone: {GONE[gone]['say']}"
        return _unknown(path, groups)
    if problem["type"] == "missing":
        return f"{path} is missing"
    # pydantic writes "Input should be ..." or "String should have ...": the key stands there.
    message = re.sub(r"^(Value error, |\w+ (?=should ))", "", problem["msg"])
    # Scrubbed: what is refused may be a secret that stands in the wrong place.
    value = scrub({path: problem["input"]})
    wrong = _shown(value[path] if isinstance(value, dict) else None)
    return f"{path}={wrong} {message}{_remedy(path, problem['input'], default(path))}"


def _unknown(path: str, groups: Iterable[str]) -> str:
    near = nearest_key(path, groups)
    hint = f"did you mean {near}?" if near else "`igrpo keys` lists the known ones"
    return f"unknown key {path}: {hint}"


def _remedy(path: str, wrong: Any, works: Any) -> str:
    """`: set key=value`, where a plain value is known to work."""
    if works is None or works == wrong or not isinstance(works, bool | int | float | str):
        return ""
    text = str(works).lower() if isinstance(works, bool) else str(works)
    return f": set {path}={text}" if text and not set(text) & set("\n {}'$") else ""


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

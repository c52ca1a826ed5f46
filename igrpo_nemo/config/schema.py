"""The root of the typed config tree, and the tree as a list of dotted keys.

The list is for `igrpo keys`, and for messages about keys that nobody knows or reads.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from igrpo_nemo.config import nemo_keys as nemo
from igrpo_nemo.config.igrpo_keys import IGRPO, LOCAL_ONLY
from igrpo_nemo.config.section import HostSection, Section
from igrpo_nemo.feedback import Feedback, feedback_class


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
    whatever is spelled alike. `extra` are further names at the root: the config groups.
    """
    known = [*(key.path for key in all_keys()), *extra]
    parent, _, leaf = path.rpartition(".")
    siblings = [k for k in known if k.rpartition(".")[0] == parent]
    if close := _close(leaf, [_leaf(k) for k in siblings], cutoff=0.6):
        return f"{parent}.{close}" if parent else close
    if namesakes := [k for k in known if _leaf(k) == leaf]:
        return _close(path, namesakes, cutoff=0.0)
    if close := _close(leaf, [_leaf(k) for k in known], cutoff=0.75):
        return next(k for k in known if _leaf(k) == close)
    return _close(path, known, cutoff=0.75)


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

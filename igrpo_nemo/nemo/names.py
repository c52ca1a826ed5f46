"""What this package needs of NeMo-RL: its version, and what `names.yaml` lists.

Checked before anything is started; imports nothing of NeMo-RL until then.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
import re
import sys
import types
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path

import typing_extensions
import yaml

from igrpo_nemo.config.nemo_schema import nemo_schema
from igrpo_nemo.config.section import ABSENT, at
from igrpo_nemo.errors import UserError

RELEASE = (0, 7)
"""The NeMo-RL release whose sources this was read and tested against."""
MAIN = "main of 2026-08-22 (7ea279abf)"
"""The commit as well, which is on the way to 0.8; its version is that of 0.6 still."""
NEWEST = (0, 8)


def check_nemo_rl() -> None:
    """Raises `UserError` where NeMo-RL is missing or differs from what this package stands on;
    warns where it does not, but was not tested."""
    if sys.version_info < (3, 12) and typing.TypedDict.__module__ == "typing":
        raise UserError(
            f"NeMo-RL's configs need Python 3.12 or newer, this is {sys.version_info[0]}."
            f"{sys.version_info[1]}: use 3.13, as its container does, or engine=local"
        )
    try:
        version = tuple(import_module("nemo_rl.package_info").VERSION[:3])
    except ImportError as error:
        raise UserError(
            f"NeMo-RL cannot be imported ({error}): use its 0.7.0 container, or put the source "
            "tree of v0.7.0 on PYTHONPATH; docs/install.md says how"
        ) from error
    found, tested = ".".join(map(str, version)), f"0.7.0 and {MAIN}"
    if version[:2] > NEWEST or version[:2] < RELEASE and not _is_main():
        raise UserError(
            f"NeMo-RL {found} is installed, but igrpo-nemo needs 0.7 or 0.8: use the container of "
            f"v0.7.0 (tested: {tested})"
        )
    if differences := [*_differences()]:
        raise UserError(f"this NeMo-RL differs from {tested}: {'; '.join(differences)}")
    if version[:2] != RELEASE:
        warnings.warn(
            f"igrpo-nemo was tested with NeMo-RL {tested}; this one calls itself {found}: every "
            "name that is relied on is there, and what else it changes is not known",
            stacklevel=2,
        )


def check_keys(values: Mapping[str, typing.Any]) -> None:
    """Raises `UserError` where a config sets what this NeMo-RL reads no more, without a word, or
    does not have yet."""
    for path in needed()["gone"] if _is_main() else ():
        if at(values, path) is not None:
            raise UserError(f"{path} is a key of NeMo-RL 0.7 that this one ignores: leave it out")
    if newer := [path for path in nemo_schema().newer if at(values, path, ABSENT) is not ABSENT]:
        here = dict(annotated_keys())
        for path in sorted(newer):
            if path not in here:
                found = import_module("nemo_rl.package_info").__version__
                raise UserError(f"{path} is no key of the installed NeMo-RL {found}: leave it out")


def annotated_keys() -> Iterator[tuple[str, bool]]:
    """The dotted keys of the installed NeMo-RL's own `MasterConfig`, and whether any key goes below
    them."""
    yield from _fields(import_module("nemo_rl.algorithms.grpo").MasterConfig, "")


def _fields(annotation: typing.Any, path: str) -> Iterator[tuple[str, bool]]:
    for name, kind in _members(annotation).items():
        here = f"{path}.{name}" if path else name
        kinds = [*_alternatives(kind)]
        if here == "policy.generation":  # `GenerationConfig` leaves the backends' sections out
            generation = "nemo_rl.models.generation"
            for module, backend in (
                ("megatron", "MCoreGenerationConfig"),
                ("sglang", "SGLangConfig"),
                ("vllm", "VllmConfig"),
            ):
                kinds.append(getattr(import_module(f"{generation}.{module}.config"), backend))
        yield here, any(k in (dict, typing.Any) or typing.get_origin(k) is dict for k in kinds)
        for each in kinds:
            yield from _fields(each, here)


def _members(annotation: typing.Any) -> dict[str, typing.Any]:
    if typing_extensions.is_typeddict(annotation) or dataclasses.is_dataclass(annotation):
        return typing_extensions.get_type_hints(annotation)
    fields = getattr(annotation, "model_fields", {})
    return {name: field.annotation for name, field in fields.items()}


def _alternatives(annotation: typing.Any) -> Iterator[typing.Any]:
    """The types that a value may have, those of a list's items included."""
    forms = (typing_extensions.NotRequired, typing_extensions.Required, typing_extensions.Annotated)
    if typing_extensions.get_origin(annotation) in (typing.Union, types.UnionType, list, *forms):
        for argument in typing_extensions.get_args(annotation):
            yield from _alternatives(argument)
    else:
        yield annotation


def _is_main() -> bool:
    rollouts = import_module("nemo_rl.experience.rollouts")
    return hasattr(rollouts, "run_async_multi_turn_rollout_groups")


def needed() -> dict[str, typing.Any]:
    """What `names.yaml` holds, whose comments say what its parts are."""
    path = Path(__file__).with_suffix(".yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def callers() -> Iterator[tuple[typing.Any, str]]:
    """Where NeMo-RL rolls out: each module (trainer, async collector, data-plane actor), and each
    name of a rollout in it."""
    for module_name, rollouts in needed()["rollouts"].items():
        module = import_module(module_name)
        yield from ((module, n) for either in rollouts for n in either if hasattr(module, n))


def _differences() -> Iterator[str]:
    wanted = needed()
    for module, names in wanted["names"].items():
        for name, details in names.items():
            try:  # boundary: whatever NeMo-RL's modules do when they are imported
                value = operator.attrgetter(name)(import_module(module))
            except AttributeError:
                yield f"{module} has no {name}"
            except Exception as error:
                reason = str(error).partition("\n")[0]
                yield f"{module} cannot be imported ({reason})"
            else:
                yield from (f"{module}.{name} {each}" for each in _lacking(value, details))
    for module_name, rollouts in wanted["rollouts"].items():
        source = _source(module_name)
        called = set(re.findall(r"\brun_\w*rollout\w*(?=\()|\brun_\w*_turn_rollout\w*", source))
        for either in rollouts:
            if not called.intersection(either):
                yield f"{module_name} has no {' or '.join(either)}"
            called.difference_update(either)
        for name in sorted(called):
            if not re.fullmatch(wanted["other_rollouts"], name):
                yield f"{module_name} rolls out by {name}, which is not known"
    for module_name, texts in wanted["sources"].items():
        source = _source(module_name)
        yield from (f"{module_name} has no {text}" for text in texts if text not in source)
    for module_name in wanted["checkpointer"]["modules"]:
        called = set(re.findall(r"\bcheckpointer\.(\w+)\(", _source(module_name)))
        for method in sorted(called.difference(wanted["checkpointer"]["methods"])):
            yield f"{module_name} calls checkpointer.{method}, which is not known"


def _source(module_name: str) -> str:
    return inspect.getsource(import_module(module_name))


def _lacking(value: typing.Any, details: Sequence[str]) -> Iterator[str]:
    """The parameters that a function or class does not take; of a class, `.names` stand for
    attributes or fields that it neither has nor, by its source, gives to its objects."""
    parameters = [each for each in details if not each.startswith(".")]
    accepted = inspect.signature(value).parameters if parameters else {}
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    missing = [] if anything else [each for each in parameters if each not in accepted]
    if missing:
        yield f"takes no {', '.join(missing)}"
    attributes = [each[1:] for each in details if each.startswith(".")]
    if fields := vars(value).get("__annotations__") if attributes else None:
        absent = [each for each in attributes if each not in fields]
    else:
        source = inspect.getsource(value) if attributes else ""
        given = (f"self.{each} = " in source or hasattr(value, each) for each in attributes)
        absent = [each for each, found in zip(attributes, given, strict=True) if not found]
    if absent:
        yield f"has no {', '.join(absent)}"

"""The keys of NeMo-RL's `MasterConfig`, from its own annotations and sources.

    python tests/nemo/nemo_schema.py     writes igrpo_nemo/config/nemo_schema.json again

The file holds names alone: `annotated` keys; `used` ones that NeMo-RL reads, or sets in its
example, without an annotation; `open` mappings, below which any key goes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nemo_source
import typing_extensions
import yaml

EXAMPLE = "examples/configs/grpo_math_1B.yaml"
READS = (
    ("megatron_cfg", "policy.megatron_cfg"),
    ("dtensor_cfg", "policy.dtensor_cfg"),
    ("sequence_packing", "policy.sequence_packing"),
    ("dynamic_batching", "policy.dynamic_batching"),
    ("vllm_cfg", "policy.generation.vllm_cfg"),
)
"""Names under which the sources hold a section, and its place."""

WRAPPERS = (
    typing.Union,
    types.UnionType,
    list,
    typing_extensions.NotRequired,
    typing_extensions.Required,
    typing_extensions.Annotated,
)
"""Forms around the type of a value, or of a list's items."""

UNREAD = {"igrpo", "env", "data"}
"""Sections that this project replaces on the way, or that are its own."""


def schema() -> dict[str, list[str]]:
    """The snapshot's content."""
    keys = dict(_fields(_master_config(), ""))
    opened = sorted(path for path, is_open in keys.items() if is_open)
    used = sorted(
        path
        for path in {*_read_in_sources(), *_set_in_example()}
        if path not in keys and not _below(path, opened)
    )
    return {"annotated": sorted(set(keys) - set(opened)), "used": used, "open": opened}


def _master_config() -> Any:
    from nemo_rl.algorithms.grpo import MasterConfig

    return MasterConfig


def _fields(annotation: Any, path: str) -> Iterator[tuple[str, bool]]:
    """Dotted keys below a type, and whether any key goes below them."""
    for name, kind in _members(annotation).items():
        here = f"{path}.{name}" if path else name
        # `GenerationConfig` leaves the backends' own sections out.
        backends = _backends() if here == "policy.generation" else []
        kinds = [*_alternatives(kind), *backends]
        yield here, any(_is_open(each) for each in kinds)
        for each in kinds:
            yield from _fields(each, here)


def _backends() -> list[Any]:
    from nemo_rl.models.generation.megatron.config import MCoreGenerationConfig
    from nemo_rl.models.generation.sglang.config import SGLangConfig
    from nemo_rl.models.generation.vllm.config import VllmConfig

    return [MCoreGenerationConfig, SGLangConfig, VllmConfig]


def _members(annotation: Any) -> dict[str, Any]:
    if typing_extensions.is_typeddict(annotation) or dataclasses.is_dataclass(annotation):
        return typing_extensions.get_type_hints(annotation)
    if hasattr(annotation, "model_fields"):
        return {name: field.annotation for name, field in annotation.model_fields.items()}
    return {}


def _alternatives(annotation: Any) -> Iterator[Any]:
    """The types that a value may have, those of a list's items included."""
    if typing_extensions.get_origin(annotation) not in WRAPPERS:
        yield annotation
        return
    for argument in typing_extensions.get_args(annotation):
        yield from _alternatives(argument)


def _is_open(annotation: Any) -> bool:
    return annotation in (dict, Any) or typing_extensions.get_origin(annotation) is dict


def _read_in_sources() -> Iterator[str]:
    for file in sorted((_source() / "nemo_rl").rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        for name, place in READS:
            reads = rf"\b{name}(?:[\"'](?:\]|, {{}}\)))?(?:\.get\(|\[)\s*[\"'](\w+)[\"']"
            yield from (f"{place}.{key}" for key in re.findall(reads, text))


def _set_in_example() -> Iterator[str]:
    values = yaml.safe_load((_source() / EXAMPLE).read_text(encoding="utf-8"))
    yield from _paths({key: value for key, value in values.items() if key not in UNREAD}, "")


def _paths(value: Any, path: str) -> Iterator[str]:
    for item in value if isinstance(value, list) else [value]:
        for key, child in item.items() if isinstance(item, dict) else ():
            here = f"{path}.{key}" if path else key
            yield here
            yield from _paths(child, here)


def _below(path: str, opened: list[str]) -> bool:
    return any(path.startswith(f"{prefix}.") for prefix in opened)


def _source() -> Path:
    import nemo_rl

    return Path(next(iter(nemo_rl.__path__))).parent


if __name__ == "__main__":
    from igrpo_nemo.config.nemo_schema import FILE

    assert nemo_source.FOUND, nemo_source.MISSING
    FILE.write_text(json.dumps(schema(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {FILE}")

"""The keys of NeMo-RL's `MasterConfig`, from its own annotations and sources.

    python tests/nemo/nemo_schema.py     writes igrpo_nemo/config/nemo_schema.json again

The file holds names alone, and `NemoSchema` says which: those of 0.7.0 where that is at hand
(NEMO_RL_SRC), and where main is, what it has beyond them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nemo_source
import yaml

from igrpo_nemo.config.nemo_schema import FILE, nemo_schema
from igrpo_nemo.nemo.names import annotated_keys

EXAMPLE = "examples/configs/grpo_math_1B.yaml"
READS = (
    ("megatron_cfg", "policy.megatron_cfg"),
    ("dtensor_cfg", "policy.dtensor_cfg"),
    ("sequence_packing", "policy.sequence_packing"),
    ("dynamic_batching", "policy.dynamic_batching"),
    ("vllm_cfg", "policy.generation.vllm_cfg"),
)
"""Names under which the sources hold a section, and its place."""

UNREAD = {"igrpo", "env", "data"}
"""Sections that this project replaces on the way, or that are its own."""


def schema() -> dict[str, list[str]]:
    """The names of the NeMo-RL at hand."""
    keys = dict(annotated_keys())
    opened = sorted(path for path, is_open in keys.items() if is_open)
    used = sorted(
        path
        for path in {*_read_in_sources(), *_set_in_example()}
        if path not in keys and not _below(path, opened)
    )
    return {"annotated": sorted(set(keys) - set(opened)), "used": used, "open": opened}


def newer(live: dict[str, list[str]]) -> dict[str, list[str]]:
    """What is annotated in the NeMo-RL at hand and was not in 0.7.0."""
    known = nemo_schema().names
    own = tuple(f"{section}." for section in UNREAD)
    names = {*live["annotated"], *live["open"]} - known
    names = {name for name in names if not name.startswith(own)}
    return {"newer": sorted(names), "newer_open": sorted(names.intersection(live["open"]))}


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
    assert nemo_source.FOUND, nemo_source.MISSING
    kept, live = json.loads(FILE.read_text(encoding="utf-8")), schema()
    kept |= live if "0.7" in str(_source()) else newer(live)
    FILE.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {FILE}")

"""What may stand in the mappings that the typed config leaves open to NeMo-RL 0.7.0.

    nemo_schema.json (names alone, made from NeMo-RL's annotations) -> unknown keys of a config
    TYPES (what the checks and the preflight compute with)          -> wrong types

NeMo-RL lets unknown keys through without a word: a misspelt one would be a default in disguise.
Over a wrong type its own code would trip late.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from igrpo_nemo.config.schema import Config
from igrpo_nemo.config.section import ABSENT, at

FILE = Path(__file__).with_suffix(".json")

OWN_SECTIONS = frozenset({"igrpo", "data", "env"})
"""Sections that are the project's, or rewritten for NeMo-RL: the typed config checks them."""


@dataclass(frozen=True, slots=True)
class NemoSchema:
    """Dotted key names.

    `annotated`: in NeMo-RL's own types. `used`: read by its code, or set in its example, without
    being annotated. `open`: mappings below which any key goes.
    """

    annotated: frozenset[str]
    used: frozenset[str]
    open: frozenset[str]

    @property
    def names(self) -> frozenset[str]:
        return self.annotated | self.used | self.open


@cache
def nemo_schema() -> NemoSchema:
    """The names of v0.7.0."""
    names = json.loads(FILE.read_text(encoding="utf-8"))
    return NemoSchema(**{kind: frozenset(values) for kind, values in names.items()})


def keys_beyond(
    values: Mapping[str, Any],
    known: frozenset[str],
    own_sections: Collection[str] = OWN_SECTIONS,
) -> list[str]:
    """Keys of a plain config that are not in `known`, outermost first; below open mappings and in
    `own_sections` none is looked at.
    """
    sections = {name: value for name, value in values.items() if name not in own_sections}
    return list(_beyond(sections, "", known))


def nearest_name(path: str) -> str | None:
    """The known key beside an unknown one that is spelled most like it; None where none is."""
    parent, _, leaf = path.rpartition(".")
    known = nemo_schema().names
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(leaf, siblings, n=1)
    return f"{parent}.{near[0]}" if near else None


def _beyond(value: Any, path: str, known: frozenset[str]) -> Iterator[str]:
    for item in value if isinstance(value, list) else [value]:
        for key, child in item.items() if isinstance(item, Mapping) else ():
            here = f"{path}.{key}" if path else str(key)
            if here not in known:
                yield here
            elif here not in nemo_schema().open:
                yield from _beyond(child, here, known)


@dataclass(frozen=True, slots=True)
class _Kind:
    """A type of value: how to tell it, how to say it, and one that works."""

    says: str
    accepts: Callable[[Any], bool]
    works: str


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_SIZE = _Kind("a whole number of 1 or more", lambda v: _is_integer(v) and v >= 1, "1")
_TENSOR = _Kind("a whole number of 1 or more", lambda v: _is_integer(v) and v >= 1, "2")
_TOKENS = _Kind("a whole number of 1 or more", lambda v: _is_integer(v) and v >= 1, "16384")
_BOOLEAN = _Kind("true or false", lambda v: isinstance(v, bool), "false")
_SWITCH = _Kind("true or false", lambda v: isinstance(v, bool), "true")
_SHARE = _Kind(
    "a number above 0 and up to 1",
    lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 < v <= 1,
    "0.85",
)
_COUNT = _Kind("null or a whole number", lambda v: v is None or _is_integer(v) and v >= 0, "null")
_GRANULARITY = _Kind("full or selective", lambda v: v in ("full", "selective"), "full")

TYPES: dict[str, _Kind] = {
    "policy.megatron_cfg.enabled": _SWITCH,
    "policy.megatron_cfg.tensor_model_parallel_size": _TENSOR,
    "policy.megatron_cfg.pipeline_model_parallel_size": _SIZE,
    "policy.megatron_cfg.context_parallel_size": _SIZE,
    "policy.megatron_cfg.sequence_parallel": _BOOLEAN,
    "policy.megatron_cfg.activation_checkpointing": _SWITCH,
    "policy.megatron_cfg.recompute_granularity": _GRANULARITY,
    "policy.megatron_cfg.defer_fp32_logits": _SWITCH,
    "policy.megatron_cfg.optimizer.use_distributed_optimizer": _SWITCH,
    "policy.megatron_cfg.optimizer.use_precision_aware_optimizer": _SWITCH,
    "policy.megatron_cfg.optimizer.optimizer_cpu_offload": _BOOLEAN,
    "policy.megatron_cfg.distributed_data_parallel_config.grad_reduce_in_fp32": _BOOLEAN,
    "policy.dtensor_cfg.enabled": _BOOLEAN,
    "policy.dtensor_cfg.tensor_parallel_size": _SIZE,
    "policy.dtensor_cfg.context_parallel_size": _SIZE,
    "policy.dtensor_cfg.activation_checkpointing": _SWITCH,
    "policy.dtensor_cfg.cpu_offload": _BOOLEAN,
    "policy.dynamic_batching.enabled": _BOOLEAN,
    "policy.dynamic_batching.train_mb_tokens": _TOKENS,
    "policy.generation.vllm_cfg.tensor_parallel_size": _SIZE,
    "policy.generation.vllm_cfg.pipeline_parallel_size": _SIZE,
    "policy.generation.vllm_cfg.gpu_memory_utilization": _SHARE,
    "policy.generation.vllm_cfg.max_model_len": _TOKENS,
    "policy.generation.vllm_cfg.async_engine": _SWITCH,
    "policy.generation.vllm_cfg.enforce_eager": _BOOLEAN,
    "policy.generation.vllm_kwargs.max_num_seqs": _SIZE,
    "policy.generation.colocated.enabled": _SWITCH,
    "policy.generation.colocated.resources.gpus_per_node": _COUNT,
    "policy.generation.colocated.resources.num_nodes": _COUNT,
    "grpo.async_grpo.enabled": _BOOLEAN,
}
"""Types of the values that the checks and the preflight compute with, where they are given."""


def open_key_problems(config: Config) -> Iterator[str]:
    """A line for every wrong type inside the open mappings."""
    values = config.to_dict()
    for path, kind in TYPES.items():
        value = at(values, path, ABSENT)
        if value is not ABSENT and not kind.accepts(value):
            shown = "null" if value is None else str(value)
            yield f"{path}={shown} should be {kind.says}: set {path}={kind.works}"

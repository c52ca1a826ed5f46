"""What excludes what: rules.yaml has the conditions and the lines, this reads them.

    rules.yaml[section] + config + what is computed of it -> a line for each rule that holds

`checks` and `launch_checks` have what a table cannot say: divisors, values that must be worked out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from igrpo_nemo.config.machines import is_async_rollout, parallel
from igrpo_nemo.config.schema import Config
from igrpo_nemo.config.section import ABSENT, at, shown

RuleSection = Literal["any engine", "local", "NeMo-RL", "backends", "machines"]

_PLACE = re.compile(r"\{(=?)([\w.]+)\}")


def broken_rules(section: RuleSection, config: Config) -> Iterator[str]:
    """The lines of a section's rules that hold, in their order."""
    facts = {**config.to_dict(), "is": _computed(config)}

    def written(place: re.Match[str]) -> str:
        value = shown(at(facts, place[2]))
        return value if place[1] else f"{place[2]}={value}"

    for rule in _rules()[section]:
        if all(_holds(at(facts, key), wanted, facts) for key, wanted in rule["if"].items()):
            yield _PLACE.sub(written, rule["say"])


def lacking(config: Config) -> Iterator[str]:
    """A line for each key that engine `local` lacks and whose value changes the method."""
    values = config.to_dict()
    for path, neutral in _rules()["lacking"].items():
        value = at(values, path)
        if value is not None and value != neutral:
            yield f"{path}={shown(value)} is not known to engine local: set it to {shown(neutral)}"


def _holds(value: Any, wanted: Any, facts: Mapping[str, Any]) -> bool:
    """Whether a key's value is as a rule has it; rules.yaml explains the spellings."""
    if isinstance(wanted, list):
        return any(_holds(value, each, facts) for each in wanted)
    operator, _, rest = str(wanted).partition(" ")
    if operator == "not":
        return not _holds(value, yaml.safe_load(rest), facts)
    if operator in ("<", ">"):
        bound = at(facts, rest, ABSENT)
        bound = yaml.safe_load(rest) if bound is ABSENT else bound
        return value is not None and (value < bound if operator == "<" else value > bound)
    return bool(value) == wanted if isinstance(wanted, bool) else value == wanted


def _computed(config: Config) -> dict[str, Any]:
    """The values below `is`."""
    feedback, grpo, spread = config.feedback, config.grpo, parallel(config)
    shaping, vllm = grpo.reward_shaping, config.policy.generation.vllm
    return {
        "two_stage": feedback.two_stage,
        "both_stages": feedback.two_stage and feedback.trains_drafts,
        "repeats_question": feedback.repeats_question,
        "best_reward": config.igrpo.reward.best,
        "overlong_penalty": shaping.enabled and shaping.stop_properly_penalty_coef is None,
        "validates": validates(config),
        "held_out": config.data.validation is not None
        or any(train.split_validation_size for train in config.data.train_sets),
        "async_rollout": is_async_rollout(config),
        "colocated": config.policy.generation.is_colocated,
        "megatron": spread.backend == "megatron",
        "tensor": spread.tensor,
        "pipeline": spread.pipeline,
        "context": spread.context,
        "fp8_cache": str(vllm.get("kv_cache_dtype")).startswith("fp8"),
    }


def validates(config: Config) -> bool:
    """Whether a run validates at all."""
    return config.grpo.val_period > 0 or config.grpo.val_at_start or config.grpo.val_at_end


@cache
def _rules() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))

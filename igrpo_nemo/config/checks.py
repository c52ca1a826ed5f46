"""What contradicts what in a config, each in one line that says what to change.

    config -> facts (its keys, and what is computed of them: `is`) -> rules.yaml -> lines
    check          whatever runs it, and engine `local`: the first line becomes the error
    check_launch   what NeMo-RL 0.7.0 would find only once Ray runs, or never

rules.yaml has the conditions and the lines; here is what they compute with, and what no table can
say.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from igrpo_nemo.config.derive import largest_divisor
from igrpo_nemo.config.machines import (
    TENSOR,
    generation_parallel,
    is_async_rollout,
    machines,
    parallel,
)
from igrpo_nemo.config.nemo_schema import keys_beyond, nemo_schema
from igrpo_nemo.config.schema import Config, all_keys, nearest_key, unread
from igrpo_nemo.config.section import ABSENT, at, shown
from igrpo_nemo.errors import UserError
from igrpo_nemo.feedback.protocol import memory_of
from igrpo_nemo.tasks import TASKS

Facts = Mapping[str, Any]
_PLACE = re.compile(r"\{(=?)([\w.]+)\}")
_COMPARISONS = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "%": operator.mod,
}
MOST_GENERATED = 1_000_000
"""Problems of a generated task; making more of them takes minutes without a sign of life."""


def check(config: Config) -> None:
    """Raises `UserError` with the first contradiction in a derived config."""
    for message in _problems(config):
        raise UserError(message)


def _problems(config: Config) -> Iterator[str]:
    yield from _nemo_keys(config)
    yield from config.feedback.problems()
    rules, facts = _table("rules"), {**config.to_dict(), "is": _computed(config)}
    yield from broken_rules(rules["any engine"], facts)
    yield from _data(config)
    if config.igrpo.engine == "local":
        for path, neutral in rules["lacking"].items():
            if (value := at(facts, path)) is not None and value != neutral:
                wanted = shown(neutral)
                yield f"{path}={shown(value)} is not known to engine local: set it to {wanted}"
        yield from broken_rules(rules["local"], facts)


def check_launch(config: Config) -> None:
    """Raises `UserError` with the first thing that this engine cannot do, or NeMo-RL rejects."""
    for message in launch_problems(config):
        raise UserError(message)


def launch_problems(config: Config) -> list[str]:
    """Everything that stands against a launch; empty for engine `local`.

    A wrong type ends the list, as do machines that cannot be used: what is computed from these
    would be noise.
    """
    if config.igrpo.engine == "local":
        return []
    if wrong := list(_wrong_types(config)):
        return wrong
    rules, facts = _table("rules"), {**config.to_dict(), "is": _computed(config)}
    problems = [*broken_rules(rules["NeMo-RL"], facts), *_not_nemos(config)]
    if config.igrpo.engine == "nemo_rl":
        if unusable := list(broken_rules(rules["backends"], facts)):
            return problems + unusable
        facts["is"] |= _sizes(config)
        problems += list(broken_rules(rules["replicas"], facts)) or broken_rules(
            rules["batch"], facts
        )
        problems += [*broken_rules(rules["packs"], facts), *broken_rules(rules["machines"], facts)]
    return problems


def broken_rules(rules: Sequence[Mapping[str, Any]], facts: Facts) -> Iterator[str]:
    """The lines of the rules that hold, in their order; rules.yaml explains how one is written."""

    def written(place: re.Match[str]) -> str:
        value = shown(at(facts, place[2]))
        return value if place[1] else f"{place[2]}={value}"

    for rule in rules:
        if all(_holds(at(facts, key), wanted, facts) for key, wanted in rule["if"].items()):
            yield _PLACE.sub(written, rule["say"])


def _holds(value: Any, wanted: Any, facts: Facts) -> bool:
    """Whether a key's value is as a rule has it; rules.yaml explains the spellings."""
    if isinstance(wanted, list):
        return any(_holds(value, each, facts) for each in wanted)
    word, _, rest = str(wanted).partition(" ")
    if word == "not":
        return not _holds(value, yaml.safe_load(rest), facts)
    if word in _COMPARISONS:
        bound = at(facts, rest, ABSENT)
        bound = yaml.safe_load(rest) if bound is ABSENT else bound
        return value is not None and bool(_COMPARISONS[word](value, bound))
    return bool(value) == wanted if isinstance(wanted, bool) else value == wanted


@cache
def _table(name: str) -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name(f"{name}.yaml").read_text(encoding="utf-8"))


def _computed(config: Config) -> dict[str, Any]:
    """The values below `is` of any config."""
    feedback, grpo, spread = config.feedback, config.grpo, parallel(config)
    shaping, generation = grpo.reward_shaping, config.policy.generation
    new, metric = generation.max_new_tokens, config.checkpointing.metric_name or ""
    together = config.data.max_input_seq_length + new
    longest, buffer = shaping.max_response_length, shaping.overlong_buffer_length
    return {
        "two_stage": feedback.two_stage,
        "both_stages": feedback.two_stage and feedback.trains_drafts,
        "repeats_question": feedback.repeats_question,
        "prompt_and_reply": together,
        # Room for a whole draft, and an eighth of it for the texts around.
        "roomy_context": together + (new + new // 8 if feedback.two_stage else 0),
        "best_reward": config.igrpo.reward.best,
        "highest_ratio": 1 + config.loss_fn.ratio_clip_max,
        "whole_batch": (grpo.num_prompts_per_step * grpo.batch_multiplier) % 1 == 0,
        "overlong_penalty": shaping.enabled and shaping.stop_properly_penalty_coef is None,
        "buffer_fits": longest is None or 0 < buffer <= longest,
        "shorter_buffer": max(1, (longest or 0) // 5),
        "ranked_by": metric.partition(":")[0] if ":" in metric else "",
        "validates": grpo.val_period > 0 or grpo.val_at_start or grpo.val_at_end,
        "held_out": config.data.validation is not None
        or any(train.split_validation_size for train in config.data.train_sets),
        "two_heads": 2 * config.igrpo.model.num_heads if config.igrpo.model else None,
        "async_rollout": is_async_rollout(config),
        "colocated": generation.is_colocated,
        "half_a_node": config.cluster.gpus_per_node // 2,
        "megatron": spread.backend == "megatron",
        "tensor": spread.tensor,
        "pipeline": spread.pipeline,
        "context": spread.context,
        "fp8_cache": str(generation.vllm.get("kv_cache_dtype")).startswith("fp8"),
    }


def _sizes(config: Config) -> dict[str, Any]:
    """Those that need usable machines: GPUs, replicas, batches, packs, and what would fit."""
    policy, spread, split = config.policy, parallel(config), machines(config)
    rest, world, vllm = spread.pipeline * spread.context, split.training, policy.generation.vllm
    count, batch = max(1, world // spread.replica), policy.train_global_batch_size
    pipeline, tensor = vllm.get("pipeline_parallel_size", 1), vllm.get(TENSOR, 1)
    rows, problems = config.grpo.num_generations_per_prompt, config.grpo.num_prompts_per_step
    of = count * config.igrpo.updates_per_rollout
    # The smallest number of problems whose rows are whole updates on every replica.
    step = next(n for n in range(1, of + 1) if n * rows % of == 0)
    packs, dynamic = policy.sequence_packing, policy.dynamic
    return {
        "training": world,
        "replica": spread.replica,
        "replicas": count,
        "backend_key": spread.prefix,
        "tensor_key": spread.tensor_key,
        "fits_without_tensor": world % rest == 0,
        "fits_without_pipeline": world % (spread.tensor * spread.context) == 0,
        "fitting_tensor": largest_divisor(max(1, world // rest), spread.tensor),
        "whole_replicas": batch % count == 0,
        "fitting_problems": max(round(problems / step), 1) * step,
        "rows_of_replica": batch // count,
        "fitting_micro_batch": largest_divisor(batch // count, policy.train_micro_batch_size),
        "same_packs": packs.logprob_mb_tokens == packs.train_mb_tokens,
        "same_batches": dynamic.get("logprob_mb_tokens") == dynamic.get("train_mb_tokens"),
        "row_multiple": policy.make_sequence_length_divisible_by or 1,
        "row_parts": (2 * spread.context if spread.context > 1 else 1)
        * (spread.tensor if spread.sequence else 1),
        "generation": split.generation,
        "vllm_pipeline": pipeline,
        "vllm_tensor": tensor,
        "vllm_expert": vllm.get("expert_parallel_size", 1),
        "vllm_replica": generation_parallel(config),
        "whole_pipelines": split.generation % pipeline == 0,
        "fitting_vllm_tensor": largest_divisor(max(1, split.generation // pipeline), tensor),
    }


def _nemo_keys(config: Config) -> Iterator[str]:
    """Keys below the mappings that the typed config leaves open."""
    known = nemo_schema().names
    for path in keys_beyond(config.to_dict(), known | nemo_schema().newer):
        near = nearest_key(path, known)
        hint = f"did you mean {near}?" if near else "NeMo-RL 0.7.0 does not know it: leave it out"
        yield f"unknown key {path}: {hint}"


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "size": ("a whole number of 1 or more", lambda v: _is_integer(v) and v >= 1),
    "boolean": ("true or false", lambda v: isinstance(v, bool)),
    "share": ("a number above 0 and up to 1", lambda v: _is_number(v) and 0 < v <= 1),
    "count": ("null or a whole number", lambda v: v is None or _is_integer(v) and v >= 0),
    "mapping": ("null or a mapping", lambda v: v is None or isinstance(v, Mapping)),
    "granularity": ("full or selective", lambda v: v in ("full", "selective")),
}
"""The kinds of `nemo_types.yaml`: how to say one, and how to tell it."""


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _wrong_types(config: Config) -> Iterator[str]:
    """A line for every wrong type inside the mappings that NeMo-RL checks, or trips over, late."""
    values = config.to_dict()
    for path, (kind, works) in _table("nemo_types").items():
        value, (says, accepts) = at(values, path, ABSENT), _KINDS[kind]
        if value is not ABSENT and not accepts(value):
            yield f"{path}={shown(value)} should be {says}: set {path}={shown(works)}"


def _data(config: Config) -> Iterator[str]:
    sets = {f"data.train.{n}": each for n, each in enumerate(config.data.train_sets)}
    if config.data.only_set:
        sets = {"data.train": config.data.only_set}
    if len({each.weight is None for each in sets.values()}) > 1:
        yield "data.train: some sets have a weight and others none; give each a weight, or none"
    if not sets:
        yield "data.train=[] names no set: give one, or a list of them"
    if config.data.validation is not None:
        sets["data.validation"] = config.data.validation
    for path, dataset in sets.items():
        if dataset.dataset_name == "jsonl" and not dataset.data_path:
            yield f"{path}.data_path is missing: data=jsonl needs a file, one JSON object a line"
        if dataset.dataset_name in TASKS:
            for key in ("num_problems", "lengths"):
                if not getattr(dataset, key):
                    yield f"{path}.{key} is missing: generated problems need it"
            if (count := dataset.num_problems or 0) > MOST_GENERATED:
                yield (
                    f"{path}.num_problems={count:,}: at most {MOST_GENERATED:,} problems are "
                    "generated"
                )
        elif dataset.lengths is not None:
            yield f"{path}.lengths is for generated problems, not for {dataset.dataset_name}"


def _not_nemos(config: Config) -> Iterator[str]:
    """A feedback that NeMo-RL cannot save, and keys of the embedded engine, where ignoring them
    would change what is measured."""
    engine = config.igrpo.engine
    if memory := memory_of(config.feedback):
        yield (
            f"igrpo.feedback={config.igrpo.feedback} remembers earlier steps, which engine "
            f"{engine} does not save: set {memory.off}, or use engine=local"
        )
    known = {key.path: key.default for key in all_keys()}
    for path in unread(config):
        own = path.startswith("igrpo.validation.")
        why = ", which samples as in training, or greedily (igrpo.validation.temperature=0)"
        yield (
            f"{path}={at(config.to_dict(), path)} is not read by engine {engine}"
            f"{why if own else ''}: set {path}={known[path]}"
        )

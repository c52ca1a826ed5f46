"""Cross-field checks: each says in one line what contradicts what, and what to change.

A check is a function from the derived config to messages; the first message becomes the error.
`rules` has those that are a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from igrpo_nemo.config.nemo_schema import keys_beyond, nearest_name, nemo_schema
from igrpo_nemo.config.rules import broken_rules, lacking, validates
from igrpo_nemo.config.schema import Config
from igrpo_nemo.errors import UserError
from igrpo_nemo.tasks import TASKS

Check = Callable[[Config], Iterator[str]]


def check(config: Config) -> None:
    """Raises `UserError` with the first contradiction in a derived config."""
    for each in CHECKS:
        for message in each(config):
            raise UserError(message)


def _nemo_keys(config: Config) -> Iterator[str]:
    """Keys below the mappings that the typed config leaves open."""
    for path in keys_beyond(config.to_dict(), nemo_schema().names | nemo_schema().newer):
        near = nearest_name(path)
        hint = f"did you mean {near}?" if near else "NeMo-RL 0.7.0 does not know it: leave it out"
        yield f"unknown key {path}: {hint}"


def _lengths(config: Config) -> Iterator[str]:
    total = config.policy.max_total_sequence_length
    question = config.data.max_input_seq_length
    new = config.policy.generation.max_new_tokens
    need = f"data.max_input_seq_length={question} + policy.generation.max_new_tokens={new}"
    # Room for a whole draft, and an eighth of it for the texts around.
    roomy = question + new + (new + new // 8 if config.feedback.two_stage else 0)
    if question + new > total:
        yield (
            f"policy.max_total_sequence_length={total} is less than {need} = {question + new}: "
            f"set policy.max_total_sequence_length={roomy}"
        )
    elif question + new == total and config.feedback.two_stage:
        yield (
            f"policy.max_total_sequence_length={total} equals {need}, which leaves no token for a "
            f"draft in q': set policy.max_total_sequence_length={roomy}"
        )


def _numbers(config: Config) -> Iterator[str]:
    loss, grpo, shaping = config.loss_fn, config.grpo, config.grpo.reward_shaping
    if loss.ratio_clip_c is not None and loss.ratio_clip_c <= 1 + loss.ratio_clip_max:
        yield (
            f"loss_fn.ratio_clip_c={loss.ratio_clip_c} must be above 1 + loss_fn.ratio_clip_max="
            f"{loss.ratio_clip_max}: raise it, or null for no dual clip"
        )
    drawn = grpo.num_prompts_per_step * grpo.batch_multiplier
    if drawn != int(drawn):
        yield (
            f"grpo.num_prompts_per_step={grpo.num_prompts_per_step} times grpo.batch_multiplier="
            f"{grpo.batch_multiplier:g} is no whole number of problems"
        )
    limit, buffer = shaping.max_response_length, shaping.overlong_buffer_length
    penalty = shaping.enabled and shaping.stop_properly_penalty_coef is None
    if penalty and limit is not None and not 0 < buffer <= limit:
        yield (
            f"grpo.reward_shaping.overlong_buffer_length={buffer} must be in 1.."
            f"max_response_length={limit}: set grpo.reward_shaping.overlong_buffer_length="
            f"{max(1, limit // 5)}"
        )


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
        elif dataset.lengths is not None:
            yield f"{path}.lengths is for generated problems, not for {dataset.dataset_name}"


def _ranking(config: Config) -> Iterator[str]:
    metric = config.checkpointing.metric_name
    if metric is None or not config.checkpointing.enabled:
        return
    if not metric.startswith(("val:", "train:")):
        yield (
            f"checkpointing.metric_name={metric}: begin it with val: or train:, as in "
            "checkpointing.metric_name=val:accuracy"
        )
    if metric.startswith("val:") and not validates(config):
        yield (
            f"checkpointing.metric_name={metric} needs validation: raise grpo.val_period, or set "
            "it to null"
        )


def _model(config: Config) -> Iterator[str]:
    if (model := config.igrpo.model) is None:
        return
    if model.hidden_size % (2 * model.num_heads):
        yield (
            f"igrpo.model.hidden_size={model.hidden_size} is no multiple of twice "
            f"igrpo.model.num_heads={model.num_heads}"
        )
    if model.num_heads % model.num_kv_heads:
        yield (
            f"igrpo.model.num_heads={model.num_heads} is no multiple of "
            f"igrpo.model.num_kv_heads={model.num_kv_heads}"
        )


def _local_engine(config: Config) -> Iterator[str]:
    if config.igrpo.engine == "local":
        yield from lacking(config)
        yield from broken_rules("local", config)


CHECKS: tuple[Check, ...] = (
    _nemo_keys,
    lambda config: config.feedback.problems(),
    _lengths,
    lambda config: broken_rules("any engine", config),
    _numbers,
    _data,
    _ranking,
    _model,
    _local_engine,
)

"""Cross-field checks: each says in one line what contradicts what, and what to change.

A check is a function from the derived config to messages; the first message becomes the error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from igrpo_nemo.config.nemo_schema import keys_beyond, nearest_name, nemo_schema
from igrpo_nemo.config.schema import Config
from igrpo_nemo.config.section import at, shown
from igrpo_nemo.errors import UserError

Check = Callable[[Config], Iterator[str]]

LOCAL_NEUTRAL: dict[str, Any] = {
    "grpo.max_rollout_turns": 1,
    "grpo.async_grpo.enabled": False,
    "grpo.adv_estimator.name": "grpo",
    "grpo.advantage_clip_low": None,
    "grpo.advantage_clip_high": None,
    "grpo.seq_logprob_error_threshold": None,
    "grpo.invalid_tool_call_advantage": None,
    "grpo.malformed_thinking_advantage": None,
    "loss_fn.use_on_policy_kl_approximation": False,
    "loss_fn.truncated_importance_sampling_type": None,
    "loss_fn.force_on_policy_ratio": False,
    "loss_fn.use_kl_in_reward": False,
    "loss_fn.use_cispo": False,
    "loss_fn.disable_ppo_ratio": False,
    "loss_fn.positive_example_nll_weight": 0.0,
    "policy.megatron_cfg.peft.enabled": False,
    "policy.dtensor_cfg.lora_cfg.enabled": False,
    "data.use_multiple_dataloader": False,
    "data.custom_dataloader": None,
    "cluster.num_nodes": 1,
}
"""NeMo-RL keys that change the method and that the local engine lacks, with the value (beside
null) that leaves it unchanged."""


def check(config: Config) -> None:
    """Raises `UserError` with the first contradiction in a derived config."""
    for each in CHECKS:
        for message in each(config):
            raise UserError(message)


def _nemo_keys(config: Config) -> Iterator[str]:
    """Keys below the mappings that the typed config leaves open."""
    for path in keys_beyond(config.to_dict(), nemo_schema().names):
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


def _objective(config: Config) -> Iterator[str]:
    loss, grpo = config.loss_fn, config.grpo
    if loss.token_level_loss and loss.sequence_level_importance_ratios:
        yield (
            "loss_fn.sequence_level_importance_ratios=true (GSPO) needs "
            "loss_fn.token_level_loss=false"
        )
    if config.igrpo.constant_length_divisor is not None:
        for key in ("token_level_loss", "sequence_level_importance_ratios"):
            if getattr(loss, key):
                yield (
                    f"igrpo.constant_length_divisor={config.igrpo.constant_length_divisor} "
                    f"(Dr. GRPO) needs loss_fn.{key}=false"
                )
    if config.igrpo.shaping_gamma is not None and loss.use_importance_sampling_correction:
        yield (
            f"igrpo.shaping_gamma={config.igrpo.shaping_gamma} has no ratio that "
            "loss_fn.use_importance_sampling_correction=true could correct: set it to false"
        )
    if loss.reference_policy_kl_penalty > 0 and grpo.skip_reference_policy_logprobs_calculation:
        yield (
            f"loss_fn.reference_policy_kl_penalty={loss.reference_policy_kl_penalty} needs the "
            "reference policy: set grpo.skip_reference_policy_logprobs_calculation=false"
        )
    if loss.ratio_clip_c is not None and loss.ratio_clip_c <= 1 + loss.ratio_clip_max:
        yield (
            f"loss_fn.ratio_clip_c={loss.ratio_clip_c} must be above 1 + loss_fn.ratio_clip_max="
            f"{loss.ratio_clip_max}: raise it, or null for no dual clip"
        )


def _sampling(config: Config) -> Iterator[str]:
    grpo = config.grpo
    if grpo.batch_multiplier != 1 and not grpo.use_dynamic_sampling:
        yield (
            f"grpo.batch_multiplier={grpo.batch_multiplier:g} is for dynamic sampling: set "
            "grpo.batch_multiplier=1, or grpo.use_dynamic_sampling=true"
        )
    drawn = grpo.num_prompts_per_step * grpo.batch_multiplier
    if drawn != int(drawn):
        yield (
            f"grpo.num_prompts_per_step={grpo.num_prompts_per_step} times grpo.batch_multiplier="
            f"{grpo.batch_multiplier:g} is no whole number of problems"
        )


def _rewards(config: Config) -> Iterator[str]:
    weights, scaling = config.igrpo.reward, config.grpo.reward_scaling
    shaping = config.grpo.reward_shaping
    if weights.best <= 0:
        yield "igrpo.reward: every weight is 0, so nothing is rewarded: raise one"
    if weights.judge > 0 and config.igrpo.judge is None:
        yield (
            f"igrpo.reward.judge={weights.judge} needs a judge: set igrpo.judge.model, or use the "
            "group reward=judge"
        )
    if scaling.enabled and scaling.source_min >= scaling.source_max:
        yield (
            f"grpo.reward_scaling: source_min={scaling.source_min} must be below source_max="
            f"{scaling.source_max}"
        )
    if scaling.enabled and scaling.source_max < weights.best:
        yield (
            f"grpo.reward_scaling.source_max={scaling.source_max} clips the best reward "
            f"{weights.best} of igrpo.reward: set grpo.reward_scaling.source_max={weights.best}"
        )
    if shaping.enabled and shaping.stop_properly_penalty_coef is None:
        limit, buffer = shaping.max_response_length, shaping.overlong_buffer_length
        if limit is None:
            yield "grpo.reward_shaping.max_response_length is missing: set it to the token limit"
        elif not 0 < buffer <= limit:
            yield (
                f"grpo.reward_shaping.overlong_buffer_length={buffer} must be in 1.."
                f"max_response_length={limit}: set grpo.reward_shaping.overlong_buffer_length="
                f"{max(1, limit // 5)}"
            )


def _data(config: Config) -> Iterator[str]:
    for name in ("train", "validation"):
        dataset = getattr(config.data, name)
        if dataset is None:
            continue
        path = f"data.{name}"
        if dataset.dataset_name == "jsonl" and not dataset.data_path:
            yield f"{path}.data_path is missing: data=jsonl needs a file, one JSON object a line"
        if dataset.dataset_name == "arithmetic":
            for key in ("num_problems", "lengths"):
                if not getattr(dataset, key):
                    yield f"{path}.{key} is missing: generated arithmetic needs it"
        elif dataset.lengths is not None:
            yield f"{path}.lengths is for generated arithmetic, not for {dataset.dataset_name}"


def _validation(config: Config) -> Iterator[str]:
    grpo, checkpointing = config.grpo, config.checkpointing
    validates = grpo.val_period > 0 or grpo.val_at_start or grpo.val_at_end
    held_out = config.data.validation or config.data.train.split_validation_size
    if validates and not held_out:
        yield (
            "validation has no problems: set data.validation or data.train.split_validation_size, "
            "or grpo.val_period=0 grpo.val_at_start=false grpo.val_at_end=false"
        )
    metric = checkpointing.metric_name
    if metric is None or not checkpointing.enabled:
        return
    if not metric.startswith(("val:", "train:")):
        yield (
            f"checkpointing.metric_name={metric}: begin it with val: or train:, as in "
            "checkpointing.metric_name=val:accuracy"
        )
    if metric.startswith("val:") and not validates:
        yield (
            f"checkpointing.metric_name={metric} needs validation: raise grpo.val_period, or set "
            "it to null"
        )


def _model(config: Config) -> Iterator[str]:
    model = config.igrpo.model
    if config.igrpo.warmup.enabled and model is None:
        yield "igrpo.warmup needs the built-in model: use model=demo, or igrpo.warmup.enabled=false"
    if model is None:
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
    if config.igrpo.engine != "local":
        return
    values = config.to_dict()
    for path, neutral in LOCAL_NEUTRAL.items():
        value = at(values, path)
        if value is not None and value != neutral:
            yield f"{path}={shown(value)} is not known to engine local: set it to {shown(neutral)}"
    if config.cluster.gpus_per_node > 1:
        yield (
            f"cluster.gpus_per_node={config.cluster.gpus_per_node}: engine local uses one GPU at "
            "most: set it to 1"
        )
    if config.igrpo.draft_prefetch != "off":
        yield (
            f"igrpo.draft_prefetch={config.igrpo.draft_prefetch} is gone from engine local, where "
            "it saved no time: leave it out (engine nemo_rl has it)"
        )


CHECKS: tuple[Check, ...] = (
    _nemo_keys,
    lambda config: config.feedback.problems(),
    _lengths,
    _objective,
    _sampling,
    _rewards,
    _data,
    _validation,
    _model,
    _local_engine,
)

"""The embedded engine's reading of the config: one function per part, keys in, settings out."""

from __future__ import annotations

from pathlib import Path

from igrpo_nemo.config import Config
from igrpo_nemo.local.checkpoint import CheckpointStore
from igrpo_nemo.local.learner import LearnerSettings
from igrpo_nemo.local.sampler import SamplingParams
from igrpo_nemo.objectives.surrogate import SurrogateConfig
from igrpo_nemo.short_circuit import ShortCircuit


def sampling_params(config: Config) -> SamplingParams:
    """`policy.generation`, for both stages."""
    generation = config.policy.generation
    return SamplingParams(
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.temperature,
        top_p=generation.top_p,
        top_k=generation.top_k,
        stop_strings=tuple(generation.stop_strings or ()),
        stop_token_ids=tuple(generation.stop_token_ids or ()),
    )


def short_circuit(config: Config) -> ShortCircuit:
    """`igrpo.short_circuit`; off where there is no Stage 2 to go on with."""
    igrpo = config.igrpo
    if igrpo.feedback == "none":
        return ShortCircuit()
    return ShortCircuit(igrpo.short_circuit, igrpo.reward.best, igrpo.rank_truncated_last)


def prefetches_drafts(config: Config) -> bool:
    """`igrpo.draft_prefetch`; off where there is no Stage 2 to sample drafts beside."""
    return config.igrpo.draft_prefetch == "fused" and config.igrpo.feedback != "none"


def surrogate_config(config: Config) -> SurrogateConfig:
    """`loss_fn`, and Dr. GRPO's divisor, which NeMo-RL lacks."""
    loss = config.loss_fn
    return SurrogateConfig(
        ratio_clip_min=loss.ratio_clip_min,
        ratio_clip_max=loss.ratio_clip_max,
        ratio_clip_c=loss.ratio_clip_c,
        token_level_loss=loss.token_level_loss,
        sequence_level_importance_ratios=loss.sequence_level_importance_ratios,
        reference_policy_kl_penalty=loss.reference_policy_kl_penalty,
        reference_policy_kl_type=loss.reference_policy_kl_type,
        kl_input_clamp_value=loss.kl_input_clamp_value,
        kl_output_clamp_value=loss.kl_output_clamp_value,
        constant_length_divisor=config.igrpo.constant_length_divisor,
    )


def learner_settings(config: Config) -> LearnerSettings:
    """`grpo`, `loss_fn` and `policy` as the learner reads them."""
    packing = config.policy.sequence_packing
    return LearnerSettings(
        surrogate=surrogate_config(config),
        normalize_rewards=config.grpo.normalize_rewards,
        use_leave_one_out_baseline=config.grpo.use_leave_one_out_baseline,
        advantage_delta=config.igrpo.advantage_delta,
        updates=config.igrpo.updates_per_rollout,
        packed=packing.enabled,
        max_micro_batch_tokens=packing.train_mb_tokens,
        max_micro_batch_rows=config.policy.train_micro_batch_size,
        temperature=config.policy.generation.temperature,
        max_grad_norm=config.policy.max_grad_norm,
        exact_entropy=config.igrpo.entropy.exact,
        overlong_filtering=config.grpo.overlong_filtering,
    )


def checkpoint_store(config: Config) -> CheckpointStore | None:
    """`checkpointing`; None where it is switched off."""
    keys = config.checkpointing
    if not keys.enabled:
        return None
    return CheckpointStore(
        Path(keys.checkpoint_dir),
        metric_name=keys.metric_name,
        higher_is_better=keys.higher_is_better,
        keep_top_k=keys.keep_top_k,
        save_period=keys.save_period,
    )

"""The embedded engine's reading of the config: one function per part, keys in, settings out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from igrpo_nemo.config import Config
from igrpo_nemo.feedback import BestDraft, Feedback, NoFeedback
from igrpo_nemo.local.checkpoint import CheckpointStore
from igrpo_nemo.local.learner import LearnerSettings
from igrpo_nemo.local.sampler import SamplingParams
from igrpo_nemo.objectives.surrogate import SurrogateConfig
from igrpo_nemo.prompts import PromptBuilder, PromptProfile, TokenBudget
from igrpo_nemo.rewards import Scorer, build_scorer
from igrpo_nemo.rewards.judge import Judge, JudgeSettings
from igrpo_nemo.types import Stage


def feedback_of(config: Config) -> Feedback:
    """`igrpo.feedback` with its options."""
    igrpo = config.igrpo
    if igrpo.feedback == "none":
        return NoFeedback(igrpo.budget)
    return BestDraft(
        num_drafts=igrpo.num_drafts,
        num_refinements=igrpo.num_refinements,
        seed=config.grpo.seed,
        draft_choice=igrpo.draft_choice,
        tie_break=igrpo.tie_break,
        on_all_zero=igrpo.on_all_zero,
        rank_truncated_last=igrpo.rank_truncated_last,
        draft_dropout=igrpo.draft_dropout,
        train_stages=tuple(Stage(stage) for stage in igrpo.train_stages),
    )


def prompt_profile(config: Config) -> PromptProfile:
    """`igrpo.prompt`."""
    texts = config.igrpo.prompt
    return PromptProfile(texts.system, texts.draft_intro, texts.draft_tag)


def prompt_builder(config: Config, tokenizer: Any) -> PromptBuilder:
    """q and q' for a tokenizer, within `policy.max_total_sequence_length`."""
    return PromptBuilder(
        tokenizer,
        prompt_profile(config),
        TokenBudget(
            config.policy.max_total_sequence_length,
            config.policy.generation.max_new_tokens,
            config.data.max_input_seq_length,
        ),
        draft_truncation=config.igrpo.draft_truncation,
        draft_content=config.igrpo.draft_content,
        chat_template_kwargs=config.policy.tokenizer.chat_template_kwargs,
    )


def scorer_of(config: Config) -> Scorer:
    """`igrpo.reward` over the verifier of `env.math`, with the judge where it has a weight."""
    weights = {name: weight for name, weight in config.igrpo.reward.model_dump().items() if weight}
    components = {"judge": _judge_of(config)} if "judge" in weights else None
    return _scorer(config, weights, components)


def evaluation_scorer(config: Config) -> Scorer:
    """Accuracy and format over the verifier of `env.math`: an evaluation asks no judge."""
    return _scorer(config, {"accuracy": 1.0, "format": 1.0}, None)


def _scorer(
    config: Config, weights: dict[str, float], components: dict[str, Judge] | None
) -> Scorer:
    env = config.env.math
    if env.num_workers == 0:
        return build_scorer(weights, components=components)
    return build_scorer(
        weights,
        workers=env.num_workers,
        item_timeout_s=env.item_timeout_s,
        group_deadline_s=env.group_deadline_s,
        memory_limit_mb=env.memory_limit_mb,
        components=components,
    )


def _judge_of(config: Config) -> Judge:
    """`igrpo.judge`; its cache lies in the run folder unless it is told elsewhere."""
    assert config.igrpo.judge is not None
    values = config.igrpo.judge.model_dump()
    cache = values.pop("cache_path", None) or Path(config.logger.log_dir) / "judge_cache.sqlite"
    return Judge(JudgeSettings(cache_path=Path(cache), **values))


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

"""What engine `nemo_rl` and `nemo_rl_local` cannot run, found before anything is started.

config ─ launch_problems ─> one line each: what contradicts what, and a value that works

NeMo-RL 0.7.0 finds most of this only once Ray runs (`setup()`, its policy and generation workers,
`async_grpo_train`, `examples/run_grpo.py`); some of it (a batch that leaves rows out) never.
Pure functions: preflight and launch share them. `cluster_checks` has what needs the machines.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from igrpo_nemo.config.cluster_checks import cluster_problems
from igrpo_nemo.config.nemo_schema import open_key_problems
from igrpo_nemo.config.schema import Config, all_keys, unread
from igrpo_nemo.config.section import at, shown
from igrpo_nemo.errors import UserError
from igrpo_nemo.feedback.protocol import memory_of

NEMO_ADVANTAGE_DELTA = 1e-6
"""What NeMo-RL adds to the standard deviation of Eq. 4."""

ADVANTAGE_ESTIMATORS = ("grpo", "gdpo", "reinforce_plus_plus")
TRUNCATIONS = ("tis", "icepop", "seq-mask-tis")
CISPO_NEEDS: dict[str, Any] = {
    "disable_ppo_ratio": False,
    "force_on_policy_ratio": False,
    "sequence_level_importance_ratios": False,
    "ratio_clip_c": None,
    "token_level_loss": True,
}
NOT_ASYNC = (
    "grpo.use_dynamic_sampling",
    "grpo.reward_scaling.enabled",
    "grpo.reward_shaping.enabled",
    "data.use_multiple_dataloader",
    "data_plane.enabled",
)
"""What `examples/run_grpo.py` rejects beside `grpo.async_grpo.enabled`; `setup()` does not."""


def check_launch(config: Config) -> None:
    """Raises `UserError` with the first thing that this engine cannot do, or NeMo-RL rejects."""
    for message in launch_problems(config):
        raise UserError(message)


def launch_problems(config: Config) -> list[str]:
    """Everything that stands against a launch; empty for engine `local`.

    A wrong type ends the list: what is computed from it would be noise.
    """
    if config.igrpo.engine == "local":
        return []
    if wrong := list(open_key_problems(config)):
        return wrong
    problems = [*_method(config), *_loss(config), *_overlap(config), *_async_training(config)]
    problems += [*_entropy(config), *_unread(config)]
    if config.igrpo.engine == "nemo_rl":
        problems += cluster_problems(config)
    return problems


def is_async_rollout(config: Config) -> bool:
    """Whether NeMo-RL will roll out through the asynchronous engine."""
    generation = config.policy.generation
    backend = generation.backend or ""
    if backend == "sglang":
        return bool(generation.use_async_rollouts)
    section = {"vllm": generation.vllm_cfg, "megatron": generation.mcore_generation_config}
    return bool((section.get(backend) or {}).get("async_engine", False))


def is_async_training(config: Config) -> bool:
    return bool((config.grpo.async_grpo or {}).get("enabled", False))


def _method(config: Config) -> Iterator[str]:
    igrpo, grpo = config.igrpo, config.grpo
    if igrpo.advantage_delta != NEMO_ADVANTAGE_DELTA and grpo.normalize_rewards:
        yield (
            f"igrpo.advantage_delta={igrpo.advantage_delta:g}: NeMo-RL adds "
            f"{NEMO_ADVANTAGE_DELTA:g}; set igrpo.advantage_delta={NEMO_ADVANTAGE_DELTA:g}, or use "
            "engine=local"
        )
    estimator = (grpo.adv_estimator or {}).get("name", "grpo")
    if estimator not in ADVANTAGE_ESTIMATORS:
        yield (
            f"grpo.adv_estimator.name={estimator} is none of {', '.join(ADVANTAGE_ESTIMATORS)}: "
            "set grpo.adv_estimator.name=grpo"
        )
    if grpo.max_rollout_turns not in (None, 1):
        yield (
            f"grpo.max_rollout_turns={grpo.max_rollout_turns}: each stage is one turn; set "
            "grpo.max_rollout_turns=1"
        )
    if (config.on_policy_distillation or {}).get("enabled"):
        yield (
            "on_policy_distillation.enabled=true: iGRPO's rows have no teachers' log-probs; set "
            "on_policy_distillation.enabled=false"
        )
    if memory := memory_of(config.feedback):
        yield (
            f"igrpo.feedback={igrpo.feedback} remembers earlier steps, which engine {igrpo.engine} "
            f"does not save: set {memory.off}, or use engine=local"
        )
    if not (config.feedback.two_stage and config.feedback.trains_drafts):
        return
    if grpo.use_dynamic_sampling:
        yield (
            f"igrpo.feedback={config.igrpo.feedback} with igrpo.train_stages=[draft, refine] and "
            "grpo.use_dynamic_sampling=true: NeMo-RL filters groups by the bare prompt, which "
            "would mix both stages; set grpo.use_dynamic_sampling=false"
        )
    if config.feedback.repeats_question:
        yield (
            "igrpo.train_stages=[draft, refine] where q' may equal q (igrpo.draft_choice=none, "
            "igrpo.draft_dropout, igrpo.on_all_zero=no_draft): NeMo-RL groups rows by their "
            "prompt, which would mix both stages; set igrpo.train_stages=[refine]"
        )


def _loss(config: Config) -> Iterator[str]:
    """What `setup()` and `ClippedPGLossFn` assert of `loss_fn`."""
    loss = config.loss_fn
    if loss.force_on_policy_ratio and config.igrpo.updates_per_rollout != 1:
        yield (
            f"loss_fn.force_on_policy_ratio=true with {config.igrpo.updates_per_rollout} updates "
            "per rollout: the ratio is 1 in the first alone; set "
            "loss_fn.force_on_policy_ratio=false"
        )
    for name, works in CISPO_NEEDS.items() if loss.use_cispo else ():
        if (getattr(loss, name) or None) != (works or None):
            key = f"loss_fn.{name}"
            yield f"loss_fn.use_cispo=true excludes this {key}: set {key}={shown(works)}"
    if config.igrpo.shaping_gamma is not None and config.grpo.seq_logprob_error_threshold:
        yield (
            f"igrpo.shaping_gamma={config.igrpo.shaping_gamma}: shaped rows differ from what the "
            "engine sampled; set grpo.seq_logprob_error_threshold=null"
        )
    yield from _truncated_importance_sampling(config)
    if loss.sequence_level_importance_ratios and loss.use_importance_sampling_correction:
        # NeMo-RL issue 2269: the weight of a row is the product of its tokens' ratios.
        setting = (
            "grpo.async_grpo.enabled=false and loss_fn.use_importance_sampling_correction=false"
            if is_async_training(config)
            else "loss_fn.use_importance_sampling_correction=false"
        )
        yield (
            "loss_fn.use_importance_sampling_correction=true with sequence-level ratios (gspo): "
            f"NeMo-RL then weighs a whole row by the product over its tokens; set {setting}"
        )


def _truncated_importance_sampling(config: Config) -> Iterator[str]:
    loss = config.loss_fn
    kind, key = loss.truncated_importance_sampling_type, "loss_fn.truncated_importance_sampling_"
    if kind is None:
        return
    if kind not in TRUNCATIONS:
        yield f"{key}type={kind} is none of {', '.join(TRUNCATIONS)}: set {key}type=tis"
        return
    if not loss.use_importance_sampling_correction:
        yield (
            f"{key}type={kind} truncates a correction that is off: set "
            "loss_fn.use_importance_sampling_correction=true"
        )
    if not loss.truncated_importance_sampling_ratio:
        yield f"{key}type={kind} needs an upper bound above 0: set {key}ratio=2.0"
    if kind != "tis" and loss.truncated_importance_sampling_ratio_min is None:
        yield f"{key}type={kind} needs a lower bound: set {key}ratio_min=0.5"
    if kind == "seq-mask-tis" and loss.sequence_level_importance_ratios:
        yield f"{key}type={kind} is for token ratios, not for GSPO: set {key}type=tis"


def _overlap(config: Config) -> Iterator[str]:
    igrpo, plane = config.igrpo, at(config.to_dict(), "data_plane.enabled")
    if not config.feedback.two_stage:
        return
    if igrpo.draft_prefetch != "off":
        fused = "igrpo.draft_prefetch=fused"
        if config.feedback.trains_drafts:
            yield (
                f"{fused} samples drafts one step early, too old to be trained on, as "
                f"igrpo.feedback={igrpo.feedback} with igrpo.train_stages=[draft, refine] does: "
                "set igrpo.draft_prefetch=off"
            )
        if config.data.use_multiple_dataloader:
            yield f"{fused} looks one batch ahead: set data.use_multiple_dataloader=false"
        if is_async_training(config):
            yield f"{fused} is of no use with grpo.async_grpo: set igrpo.draft_prefetch=off"
        if plane:
            yield f"{fused} holds the batch itself: set data_plane.enabled=false"
    if igrpo.val_draft_conditioned and plane:
        yield (
            "igrpo.val_draft_conditioned=true: the data plane keeps what an actor validates, set "
            "data_plane.enabled=false"
        )


def _async_training(config: Config) -> Iterator[str]:
    if not is_async_training(config):
        return
    values, asked = config.to_dict(), "grpo.async_grpo.enabled=true"
    for key in NOT_ASYNC:
        if at(values, key):
            yield f"{key}=true does not go with {asked}: set grpo.async_grpo.enabled=false"
    if not is_async_rollout(config):
        yield (
            f"{asked} needs the asynchronous engine: set "
            "policy.generation.vllm_cfg.async_engine=true"
        )
    if not config.loss_fn.use_importance_sampling_correction:
        yield (
            f"{asked} makes rollouts off-policy: set "
            "loss_fn.use_importance_sampling_correction=true"
        )
    if config.policy.generation.is_colocated:
        yield (
            f"{asked} needs GPUs that generate alone: set policy.generation.colocated.enabled=false"
        )


def _entropy(config: Config) -> Iterator[str]:
    if not config.igrpo.entropy.exact:
        return
    policy = config.policy
    sections = [cfg for cfg in (policy.megatron_cfg, policy.dtensor_cfg) if cfg]
    why = None
    if policy.generation.top_p != 1.0 or policy.generation.top_k is not None:
        why = "trains on filtered log-probs with policy.generation.top_p or top_k"
    elif any(cfg.get("enabled") and cfg.get("context_parallel_size", 1) > 1 for cfg in sections):
        why = "splits a sequence over ranks with context_parallel_size above 1"
    elif policy.sequence_packing.fuse_loss:
        why = "hides the logits with policy.sequence_packing.fuse_loss=true"
    if why:
        yield f"igrpo.entropy.exact=true: NeMo-RL {why}; set igrpo.entropy.exact=false"


def _unread(config: Config) -> Iterator[str]:
    """Keys of the embedded engine, where ignoring them would change what is measured."""
    known = {key.path: key.default for key in all_keys()}
    for path in unread(config):
        yield (
            f"{path}={at(config.to_dict(), path)} is not read by engine {config.igrpo.engine}: set "
            f"{path}={known[path]}"
        )

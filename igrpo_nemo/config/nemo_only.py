"""NeMo-RL v0.7.0 keys that only the NeMo-RL engine reads, in one place.

The sections of `nemo_keys` inherit from these. The embedded engine ignores what stands here; where
ignoring a value would change the method, `checks` rejects it. NeMo-RL validates the open mappings.
"""

from __future__ import annotations

from typing import Any

from igrpo_nemo.config.section import Section

Open = dict[str, Any]
"""A mapping whose keys are NeMo-RL's business."""


class GRPONemoOnly(Section):
    """Keys of `grpo` beyond the embedded engine."""

    max_rollout_turns: int | None = None
    """Turns of a rollout; iGRPO's two stages are one turn each."""
    async_grpo: Open | None = None
    """Asynchronous training: `enabled`, `max_trajectory_age_steps`, ..."""
    adv_estimator: Open | None = None
    """Advantage estimator: `name` and its options."""
    advantage_clip_low: float | None = None
    """Lower clip of the normalised advantages; null is none."""
    advantage_clip_high: float | None = None
    """Upper clip of the normalised advantages; null is none."""
    calculate_advantages_on_gpu: bool | None = None
    """Computes advantages on the GPU."""
    seq_logprob_error_threshold: float | None = None
    """Masks sequences whose two engines' log-probs differ by more; null masks none."""
    invalid_tool_call_advantage: float | None = None
    """Advantage of invalid tool calls; null leaves it."""
    malformed_thinking_advantage: float | None = None
    """Advantage of malformed thinking tags; null leaves it."""


class LossNemoOnly(Section):
    """Keys of `loss_fn` beyond the embedded engine."""

    use_on_policy_kl_approximation: bool | None = None
    """Importance-weighted KL estimate."""
    use_importance_sampling_correction: bool | None = None
    """Corrects for the difference between vLLM and the trainer; the embedded engine has none."""
    truncated_importance_sampling_type: str | None = None
    """Truncation of that correction: `tis`, `icepop` or `seq-mask-tis`."""
    truncated_importance_sampling_ratio: float | None = None
    """Its upper bound."""
    truncated_importance_sampling_ratio_min: float | None = None
    """Its lower bound."""
    force_on_policy_ratio: bool | None = None
    """Fixes the ratio to 1, which saves a forward pass with one update per rollout."""
    use_kl_in_reward: bool | None = None
    """KL penalty in the reward instead of the loss."""
    use_cispo: bool | None = None
    """CISPO's objective (arXiv 2506.13585)."""
    disable_ppo_ratio: bool | None = None
    """REINFORCE-style surrogate without a ratio."""
    positive_example_nll_weight: float | None = None
    """Weight of VAPO's likelihood term on correct samples."""


class TokenizerNemoOnly(Section):
    """Keys of `policy.tokenizer` beyond the embedded engine."""

    audio: Open | None = None
    """Audio processor options."""
    video: Open | None = None
    """Video processor options."""
    use_processor: bool | None = None
    """Loads a multimodal processor."""


class SequencePackingNemoOnly(Section):
    """Keys of `policy.sequence_packing` beyond the embedded engine."""

    logprob_mb_tokens: int | None = None
    """Tokens of a log-prob micro-batch."""
    algorithm: str | None = None
    """Bin packing: `modified_first_fit_decreasing`, ..."""
    sequence_length_round: int | None = None
    """Lengths are rounded up to a multiple of this."""
    fuse_loss: bool | None = None
    """Fuses the loss over packed sequences."""


class GenerationNemoOnly(Section):
    """Keys of `policy.generation` beyond the embedded engine."""

    backend: str | None = None
    """`vllm`, `sglang` or `megatron`."""
    model_name: str | None = None
    """Written by NeMo-RL."""
    use_async_rollouts: bool | None = None
    """Per-sample asynchronous rollouts."""
    port_range_low: int | None = None
    """First port of the inference servers."""
    port_range_high: int | None = None
    """Last port of the inference servers."""
    colocated: Open | None = None
    """Whether generation shares the training GPUs, and its `resources` where not."""
    vllm_cfg: Open | None = None
    """vLLM: parallelism, memory, context, engine."""
    vllm_kwargs: Open | None = None
    """Passed to vLLM as they are."""
    sglang_cfg: Open | None = None
    """SGLang's options."""
    mcore_generation_config: Open | None = None
    """Megatron inference options."""


class PolicyNemoOnly(Section):
    """Keys of `policy` beyond the embedded engine."""

    logprob_batch_size: int | None = None
    """Rows of a log-prob micro-batch."""
    logprob_chunk_size: int | None = None
    """Tokens per chunk of the log-prob computation; null computes it whole."""
    generation_batch_size: int | None = None
    """Batch of NeMo-RL's Hugging Face generation backend."""
    make_sequence_length_divisible_by: int | None = None
    """Sequence lengths are padded to a multiple of this."""
    offload_optimizer_for_logprob: bool | None = None
    """Moves the optimizer off the GPU while log-probs are computed."""
    refit_buffer_size_gb: float | None = None
    """Buffer of the weight transfer to the inference engine."""
    hf_config_overrides: Open | None = None
    """Overrides of the Hugging Face model config."""
    dtensor_cfg: Open | None = None
    """DTensor (FSDP2) training backend."""
    megatron_cfg: Open | None = None
    """Megatron-Core training backend."""
    dynamic_batching: Open | None = None
    """Micro-batches of similar lengths."""
    draft: Open | None = None
    """Speculative-decoding draft model, unrelated to iGRPO's drafts."""
    router_replay: Open | None = None
    """Mixture-of-experts router replay."""
    reward_model_cfg: Open | None = None
    """Reward-model policies."""
    pretrained_checkpoint: Open | None = None
    """Megatron checkpoint of the initial weights."""
    quant_cfg: str | None = None
    """ModelOpt quantisation; its other keys need NeMo-RL's own launcher."""


class DatasetNemoOnly(Section):
    """Keys of a data set beyond the embedded engine."""

    prompt_file: str | None = None
    """NeMo-RL prompt file; iGRPO's prompts stand in `igrpo.prompt`."""
    system_prompt_file: str | None = None
    """NeMo-RL system prompt file."""
    processor: str | None = None
    """Registered data processor."""
    env_name: str | None = None
    """Registered environment."""
    download_dir: str | None = None
    """Where a downloaded set is kept."""


class DataNemoOnly(Section):
    """Keys of `data` beyond the embedded engine."""

    num_workers: int | None = None
    """Data loader workers."""
    add_bos: bool | None = None
    """Adds a beginning-of-sequence token."""
    add_eos: bool | None = None
    """Adds an end-of-sequence token."""
    add_generation_prompt: bool | None = None
    """Adds the template's generation prompt."""
    add_system_prompt: bool | None = None
    """Adds the template's system prompt."""
    use_multiple_dataloader: bool | None = None
    """One loader a data set."""
    num_prompts_per_dataloader: int | None = None
    """Prompts from each of several loaders."""
    custom_dataloader: str | None = None
    """Dotted name of a loader."""
    default: Open | None = None
    """Settings that the data sets share."""


class CheckpointingNemoOnly(Section):
    """Keys of `checkpointing` beyond the embedded engine."""

    save_optimizer: bool | None = None
    """Keeps the optimizer state; the embedded engine always does, a resume needs it."""
    model_save_format: str | None = None
    """`safetensors` or `torch_save` with DTensor v2, null with anything else."""
    save_consolidated: bool | None = None
    """One consolidated file for Hugging Face."""
    model_cache_dir: str | None = None
    """Cache of the model."""
    model_repo_id: str | None = None
    """Repository of the model."""
    is_peft: bool | None = None
    """The model carries adapters."""
    peft_config: Open | None = None
    """The adapters' options."""
    is_async: bool | None = None
    """Saves in the background."""
    pretrained_checkpoint: Open | None = None
    """Megatron checkpoint of the initial weights."""


class LoggerNemoOnly(Section):
    """Keys of `logger` beyond the embedded engine."""

    swanlab_enabled: bool | None = None
    """Logs to SwanLab."""
    swanlab: Open | None = None
    """SwanLab's `project` and `name`."""
    tensorboard: Open | None = None
    """TensorBoard's own `log_dir`."""
    monitor_gpus: bool | None = None
    """Logs GPU use."""
    gpu_monitoring: Open | None = None
    """Intervals of that."""


class ClusterNemoOnly(Section):
    """Keys of `cluster` beyond the embedded engine."""

    master_port_range_low: int | None = None
    """First rendezvous port."""
    master_port_range_high: int | None = None
    """Last rendezvous port."""
    segment_size: int | None = None
    """Nodes per NVLink domain."""


class RootNemoOnly(Section):
    """Sections beyond the embedded engine."""

    data_plane: Open | None = None
    """NeMo-RL's transfer queue."""
    on_policy_distillation: Open | None = None
    """NeMo-RL's on-policy distillation."""

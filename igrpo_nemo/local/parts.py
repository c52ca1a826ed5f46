"""Everything a run is made of, opened in order and closed whatever happens.

config -> run folder (locked) -> problems -> policy -> environment, sampler
       -> learner -> newest intact checkpoint, where there is one
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import torch

from igrpo_nemo.alarms import StallAlarm
from igrpo_nemo.config import Config, rollout_steps, with_problems
from igrpo_nemo.data.order import Curriculum, EpochOrder
from igrpo_nemo.environment import TwoStageEnvironment
from igrpo_nemo.errors import UserError
from igrpo_nemo.feedback.protocol import memory_of
from igrpo_nemo.local.checkpoint import (
    CheckpointStore,
    LoadedCheckpoint,
    TrainerState,
    restore_rng,
)
from igrpo_nemo.local.fused.decoder import can_pack
from igrpo_nemo.local.learner import Learner
from igrpo_nemo.local.model import LoadedPolicy, context_of, load_weights, open_policy, reference_of
from igrpo_nemo.local.optimizer import build_optimizer, build_scheduler
from igrpo_nemo.local.packing import enable_checkpointing
from igrpo_nemo.local.sampler import Sampler
from igrpo_nemo.local.vllm_sampler import VllmSampler, why_not_vllm
from igrpo_nemo.local.warmup import small_policy
from igrpo_nemo.run.core import prompt_builder, scorer_of
from igrpo_nemo.run.folder import RunFolder
from igrpo_nemo.run.identity import check_same_inputs, check_same_run
from igrpo_nemo.run.problems import fitting_problems, training_problems, validation_problems
from igrpo_nemo.run.stop import InterruptFlag, StopRequested
from igrpo_nemo.tracking import Console, open_tracker


class RunParts:
    """The opened parts of one run; the newest intact checkpoint is resumed.

    `state` is where it stands, `metrics` those of the checkpoint that was resumed. What must be
    closed is left to `stack`. Raises `UserError` for input that cannot be used, and for a run
    folder that is in use or holds a run with other settings; `StopRequested` in a warm-up.
    """

    def __init__(self, config: Config, stack: ExitStack, interrupt: InterruptFlag) -> None:
        if config.igrpo.threads is not None:
            torch.set_num_threads(config.igrpo.threads)
        self.folder = folder = stack.enter_context(RunFolder(config.logger.log_dir))
        problems, validation = training_problems(config), validation_problems(config)
        self.policy, extra = _open_policy(config, interrupt)
        prompts = prompt_builder(config, self.policy.tokenizer)
        drop = config.igrpo.drop_overlong_prompts
        self.problems = fitting_problems(problems, prompts, drop_overlong=drop)
        self.validation = fitting_problems(validation, prompts, drop_overlong=drop)
        self.config = config = with_problems(config, len(self.problems))
        check_same_run(folder.path, config.to_dict())
        check_same_inputs(folder.path, config, self.problems, self.validation)
        scorer = scorer_of(config)
        stack.callback(scorer.close)
        self.environment = TwoStageEnvironment(prompts, scorer, config.feedback)
        self.sampler = open_sampler(config, self.policy)
        self.learner = open_learner(config, self.policy)
        batch = {
            "batch_size": int(config.grpo.num_prompts_per_step * config.grpo.batch_multiplier),
            "seed": config.grpo.seed,
            "shuffle": config.data.shuffle,
        }
        keep, ids = config.igrpo.curriculum_keep, [problem.id for problem in self.problems]
        self.order = (
            EpochOrder(len(ids), **batch) if keep is None else Curriculum(ids, keep=keep, **batch)
        )
        saves = config.checkpointing.enabled
        self.store = store = CheckpointStore(config.checkpointing) if saves else None
        newest = store and store.latest()
        checkpoint = store.load(newest) if store and newest else None
        resume_step = checkpoint.state.step if checkpoint else None
        folder.truncate_after(-1 if resume_step is None else resume_step)
        folder.write_config(config.to_dict())
        self.tracker = open_tracker(folder, config.logger, config.to_dict(), resume_step)
        stack.callback(self.tracker.close)
        self.total_steps = rollout_steps(config, len(self.problems))
        folder.write_plan(self.total_steps)
        self.console = Console(self.total_steps)
        self.console.note(how_it_runs(self.policy, self.sampler, config))
        alarm = StallAlarm(config.igrpo.stall_alarm_s, self.console.note)
        self.alarm = stack.enter_context(alarm)
        self.state = TrainerState(step=0, extra={**extra, "scheduler": config.policy.scheduler})
        self.resumed = checkpoint is not None
        self.metrics = checkpoint.metrics if checkpoint else {}
        if checkpoint is not None:
            self._restore(checkpoint)

    def _restore(self, checkpoint: LoadedCheckpoint) -> None:
        """Puts the parts where the checkpoint left them.

        A schedule that has changed since, because the run is to be longer, is stepped to where it
        would be by now; an unchanged one continues from its saved state to the last bit.
        """
        stages = self.config.policy.scheduler
        state, tensors = checkpoint.state, checkpoint.tensors
        load_weights(self.policy.model, checkpoint.model_path)
        restore_rng(tensors["rng"])
        same_schedule = state.extra.get("scheduler") == stages
        self.learner.load_state_dict(tensors, with_schedule=same_schedule)
        if memory := memory_of(self.environment.feedback):
            memory.load_state_dict(tensors["feedback"])
        self.order.load_state_dict(tensors.get("curriculum", {}))
        self.state = replace(state, extra={**state.extra, "scheduler": stages})
        assert self.store is not None
        self.store.discard_after(state.step)
        self.console.note(f"resuming after step {state.step} from {checkpoint.path}")


def _open_policy(config: Config, interrupt: InterruptFlag) -> tuple[LoadedPolicy, dict[str, float]]:
    """The policy at step 0, and what the summary must know of its warm-up."""
    if config.igrpo.model is None:
        folder, extra = config.policy.model_name, {}
        tokenizer_name = config.policy.tokenizer.name
    else:
        small = small_policy(config, _WarmupProgress(interrupt))
        folder, tokenizer_name = small.folder, None
        extra = {"warmup_seconds": small.seconds, "warmup_cached": float(small.cached)}
    policy = open_policy(
        folder,
        precision=config.policy.precision,
        tokenizer_name=tokenizer_name,
        chat_template=config.policy.tokenizer.chat_template,
    )
    if (config.policy.dtensor_cfg or {}).get("activation_checkpointing"):
        enable_checkpointing(policy.model)
    longest, limit = config.policy.max_total_sequence_length, context_of(policy.model)
    if limit is not None and longest > limit:
        raise UserError(
            f"policy.max_total_sequence_length={longest} is more than the context of {folder}: set "
            f"it to {limit} or less, or choose a model with a longer context"
        )
    return policy, extra


def open_sampler(config: Config, policy: LoadedPolicy) -> Sampler:
    """vLLM where `policy.generation.backend` says so, else the engine's own sampler.

    Raises `UserError` where vLLM is asked for and cannot serve.
    """
    generation, limit = config.policy.generation, config.policy.max_total_sequence_length
    if generation.backend is None:
        return Sampler(policy.model, policy.tokenizer, max_model_len=limit)
    if generation.backend != "vllm":
        raise UserError(
            f"policy.generation.backend={generation.backend} is NeMo-RL's alone: the embedded "
            "engine samples by itself (null) or with vllm"
        )
    if reason := why_not_vllm():
        raise UserError(f"policy.generation.backend=vllm: {reason}; null is the engine's own")
    return VllmSampler(
        policy.model,
        policy.tokenizer,
        max_model_len=limit,
        precision=policy.precision,
        vllm_cfg=generation.vllm,
        vllm_kwargs=generation.vllm_kwargs,
    )


def how_it_runs(policy: LoadedPolicy, sampler: Sampler, config: Config) -> str:
    """One line: the device, how completions are sampled, how rows are trained."""
    device, packing = policy.model.device, config.policy.sequence_packing.enabled
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rows = "packed" if packing and can_pack(policy.model) else "padded"
    return f"{name}: sampling with {sampler.way}; training on {rows} rows in {policy.precision}"


class _WarmupProgress:
    """Reports the warm-up on a console of its own, once it starts, and ends it on request."""

    def __init__(self, interrupt: InterruptFlag) -> None:
        self._interrupt = interrupt
        self._console: Console | None = None

    def __call__(self, step: int, steps: int, loss: float) -> None:
        if self._console is None:
            self._console = Console(steps)
            self._console.note("warming the small model up (once; cached for later runs)")
        self._console.stage("warm-up", step, steps)
        if self._interrupt.requested:
            self._console.note("stopped in the warm-up, of which nothing is kept; run again")
            raise StopRequested


def open_learner(config: Config, policy: LoadedPolicy) -> Learner:
    kwargs = config.policy.optimizer.kwargs.model_dump(exclude_none=True)
    optimizer = build_optimizer(policy.model.parameters(), kwargs)
    needs_reference = config.loss_fn.reference_policy_kl_penalty > 0
    return Learner(
        policy.model,
        optimizer,
        build_scheduler(optimizer, config.policy.scheduler or ()),
        config,
        reference=reference_of(policy) if needs_reference else None,
        autocast=policy.autocast,
    )

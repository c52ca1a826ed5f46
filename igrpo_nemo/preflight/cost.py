"""Time and GPU-hours of a run, from a roofline: one step is drawn, sampled, scored and trained.

    drawn lengths of a step -> decode_seconds per engine -> generation (its slowest engine)
                            -> trained tokens -> log-prob pass, forward and backward pass
    x steps, + validations -> hours x all GPUs of the run

Not modelled: rewards, checkpoints, start-up, failures, and how well kernels do beyond
`igrpo.preflight`'s shares of the peak.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from igrpo_nemo.config import Config
from igrpo_nemo.config.machines import (
    is_async_rollout,
    is_async_training,
    low_rank,
    machines,
    parallel,
)
from igrpo_nemo.feedback import Feedback
from igrpo_nemo.preflight.capacity import GB, GPU
from igrpo_nemo.preflight.decoding import PromptGroup, Speed, decode_seconds
from igrpo_nemo.preflight.shape import (
    BF16,
    Shape,
    counts,
    forward_flops,
    matrix_flops_per_token,
)
from igrpo_nemo.preflight.tokens import DRAFT_FRAME_TOKENS, Context, Responses
from igrpo_nemo.preflight.vllm_memory import VllmMemory, engines

_SEED = 0


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of one step by part, and the whole run.

    `prefill` is what an engine spends of `generation` on prompts, on average. `validation` are the
    seconds of all validations together. `trained_tokens` are those of one step with their prompts,
    as they are computed (padding included). `overlapped`: one step is sampled while another is
    trained (`grpo.async_grpo`).
    """

    generation: float
    prefill: float
    refit: float
    logprobs: float
    training: float
    validation: float
    steps: int
    gpus: int
    sampled_tokens: int
    trained_tokens: int
    overlapped: bool = False

    @property
    def step(self) -> float:
        """Seconds of a step."""
        update = self.logprobs + self.training
        if self.overlapped:
            return max(self.generation, update) + self.refit
        return self.generation + update + self.refit

    @property
    def hours(self) -> float:
        """Hours of the whole run."""
        return (self.steps * self.step + self.validation) / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.gpus


@dataclass(frozen=True, slots=True)
class Estimator:
    """What a cost is computed from. `steps` are those of the run."""

    config: Config
    shape: Shape
    gpu: GPU
    vllm: VllmMemory
    context: Context
    responses: Responses
    steps: int

    def cost(self) -> Cost:
        """The cost of the config as it is."""
        config, rng = self.config, random.Random(_SEED)
        drawn = [self._problem(rng) for _ in range(self._problems_per_step())]
        parts = self._training(drawn[: config.grpo.num_prompts_per_step])
        generation = self._generation(drawn)
        if is_async_training(config):
            # The engines do not run dry between steps: what counts is what one more step adds.
            following = [self._problem(rng) for _ in drawn]
            generation = self._generation([*drawn, *following]) - generation
        return Cost(
            generation=generation,
            prefill=self._prefill(drawn),
            refit=BF16 * counts(self.shape).total / (config.igrpo.preflight.refit_gb_per_s * GB),
            logprobs=parts.logprobs,
            training=parts.training,
            validation=self._validations() * self._validation(rng),
            steps=self.steps,
            gpus=machines(config).total,
            sampled_tokens=sum(sum(p.drafts) + sum(p.refinements) for p in drawn),
            trained_tokens=parts.tokens,
            overlapped=is_async_training(config),
        )

    def other_method(self) -> Cost:
        """GRPO's cost where the config is two-stage, iGRPO's where it is not, the same budget."""
        return replace(self, config=other_method(self.config)).cost()

    def _problems_per_step(self) -> int:
        """Under dynamic sampling one draw of `batch_multiplier` times the step's problems."""
        grpo = self.config.grpo
        return round(grpo.num_prompts_per_step * grpo.batch_multiplier)

    def _problem(self, rng: random.Random) -> _Problem:
        feedback, draw = self.config.feedback, self.responses.draw
        question = round(self.context.mean_question)
        drafts = tuple(draw(rng) for _ in range(feedback.num_drafts))
        if not feedback.two_stage:
            return _Problem(question, drafts, 0, ())
        shown = min(rng.choice(drafts), self.context.draft_room[0.5])
        refinements = tuple(draw(rng) for _ in range(feedback.num_refinements))
        return _Problem(question, drafts, question + DRAFT_FRAME_TOKENS + shown, refinements)

    def _stages(self, drawn: Sequence[_Problem]) -> tuple[list[PromptGroup], list[PromptGroup]]:
        """Drafts and refinements; GRPO's completions and nothing."""
        first = [self._group(p.question, p.drafts) for p in drawn]
        return first, [
            self._group(p.refined, p.refinements, self.config.feedback.num_prompts)
            for p in drawn
            if p.refinements
        ]

    def _prefill(self, drawn: Sequence[_Problem]) -> float:
        first, second = self._stages(drawn)
        return sum(group.prefill for group in first + second) / engines(self.config)

    def _generation(self, drawn: Sequence[_Problem]) -> float:
        """Seconds of a step's sampling: the slowest engine, with a barrier between the stages
        where the engine is synchronous, in one call with fused drafts."""
        igrpo = self.config.igrpo
        first, second = self._stages(drawn)
        if not self.config.feedback.two_stage:
            return self._slowest(first)
        if igrpo.draft_prefetch == "fused":
            return self._slowest([*first, *second])
        if not is_async_rollout(self.config):
            return self._slowest(first) + self._slowest(second)
        return self._slowest([replace(a, then=b) for a, b in zip(first, second, strict=True)])

    def _group(self, prompt: int, lengths: tuple[int, ...], prompts: int = 1) -> PromptGroup:
        """Completions of `prompts` prompts of one length."""
        vllm = self.config.policy.generation.vllm
        cached = vllm.get("enable_prefix_caching") is not False
        times = prompts if cached else len(lengths)
        rate = self.vllm.tensor * self.gpu.bf16_flops * self.config.igrpo.preflight.prefill_mfu
        return PromptGroup(prompt, lengths, times * forward_flops(self.shape, prompt) / rate)

    def _slowest(self, groups: Sequence[PromptGroup]) -> float:
        count, speed = engines(self.config), self._speed(groups)
        return max(decode_seconds(groups[i::count], speed) for i in range(min(count, len(groups))))

    def _speed(self, groups: Sequence[PromptGroup]) -> Speed:
        assumed, vllm = self.config.igrpo.preflight, self.vllm
        prompts = [max(g.prompt, g.then.prompt if g.then else 0) for g in groups]
        return Speed(
            weights=vllm.weights,
            per_token=vllm.kv_per_token,
            per_sequence=2 * vllm.state_per_sequence,  # read and written
            bandwidth=self.gpu.bandwidth * assumed.decode_bandwidth,
            flops=matrix_flops_per_token(self.shape) / vllm.tensor,
            flops_per_s=self.gpu.bf16_flops * assumed.prefill_mfu,
            overhead=assumed.decode_overhead_ms / 1000,
            places=max(1, vllm.at_once(sum(prompts) / len(prompts) + self.responses.mean)),
        )

    def _training(self, drawn: Sequence[_Problem]) -> _Training:
        """The log-prob pass and the update of the trained rows."""
        config, assumed = self.config, self.config.igrpo.preflight
        rows = [row for problem in drawn for row in problem.trained(config.feedback)]
        if not config.policy.sequence_packing.enabled:
            if not config.policy.dynamic.get("enabled"):
                rows = [max(rows)] * len(rows)  # NeMo-RL pads the whole batch to its longest row
        flops = sum(forward_flops(self.shape, row) for row in rows)
        rate = machines(config).training * self.gpu.bf16_flops
        passes = 0 if config.loss_fn.force_on_policy_ratio else 1
        passes += config.loss_fn.reference_policy_kl_penalty > 0
        return _Training(
            logprobs=passes * flops / (rate * assumed.prefill_mfu),
            training=_passes(config) * flops / (rate * assumed.train_mfu),
            tokens=sum(rows),
        )

    def _validations(self) -> int:
        grpo = self.config.grpo
        count = int(grpo.val_at_start) + (self.steps // grpo.val_period if grpo.val_period else 0)
        due = grpo.val_period and self.steps % grpo.val_period == 0
        return count + int(grpo.val_at_end and not due)

    def _validation(self, rng: random.Random) -> float:
        problems = self.config.grpo.max_val_samples or 500
        question = round(self.context.mean_question)
        groups = [self._group(question, (self.responses.draw(rng),)) for _ in range(problems)]
        return self._slowest(groups)


def other_method(config: Config) -> Config:
    """The same run without feedback, or with half of the budget as drafts; nothing else changes."""
    rows = config.igrpo.budget
    method: dict[str, Any] = {"feedback": "none", "train_stages": ["draft"]}
    if not config.feedback.two_stage:
        drafts, rows = rows // 2, rows - rows // 2
        method = {"feedback": "best_draft", "train_stages": ["refine"]}
        method |= {"num_drafts": drafts, "num_refinements": rows}
    changed = config.replaced("igrpo", **method, feedback_options={})
    return changed.replaced("grpo", num_generations_per_prompt=rows)


@dataclass(frozen=True, slots=True)
class _Problem:
    """One problem's drawn tokens: q, its completions, q' and its completions."""

    question: int
    drafts: tuple[int, ...]
    refined: int
    refinements: tuple[int, ...]

    def trained(self, feedback: Feedback) -> list[int]:
        """Tokens of each trained row with its prompt; a refinement's counts as q'."""
        rows = [self.question + n for n in self.drafts] if feedback.trains_drafts else []
        rest = feedback.num_trained - len(rows)
        return rows + [self.refined + n for n in self.refinements[:rest]]


@dataclass(frozen=True, slots=True)
class _Training:
    logprobs: float
    training: float
    tokens: int


def _passes(config: Config) -> int:
    """Forward, the gradients of inputs and of weights, which adapters leave out, and 1 for a
    forward pass that is repeated in the backward pass (full recomputation)."""
    return (2 if low_rank(config) else 3) + _recomputed(config)


def _recomputed(config: Config) -> int:
    megatron, dtensor = config.policy.megatron, config.policy.dtensor
    if parallel(config).backend == "dtensor":
        return int(bool(dtensor.get("activation_checkpointing")))
    full = megatron.get("recompute_granularity", "full") == "full"
    return int(bool(megatron.get("activation_checkpointing")) and full)

"""Time and GPU-hours of a run, from a roofline: one step is drawn, sampled, scored and trained.

    drawn lengths of a step -> decode_seconds per engine -> generation (its slowest engine)
                            -> trained tokens -> log-prob pass, forward and backward pass
    x steps, + validations -> hours x all GPUs of the run

A decoding step reads the weights and the caches of every running sequence once; it takes as long
as that or as its arithmetic, whichever is longer. Sequences leave when they end; a refinement
waits until its problem's drafts have ended, and everything waits for a free place.

Not modelled: rewards, checkpoints, start-up, failures, and how well kernels do beyond
`igrpo.preflight`'s shares of the peak.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from igrpo_nemo.config import Config
from igrpo_nemo.config.machines import is_async_rollout, is_async_training, low_rank, machines
from igrpo_nemo.preflight.memory import GPU, VllmMemory, engines, recomputed
from igrpo_nemo.preflight.shape import BF16, Shape, forward_flops, matrix_flops_per_token
from igrpo_nemo.preflight.tokens import DRAFT_FRAME_TOKENS, Context, Responses

GB = 10**9
_SEED = 0


@dataclass(frozen=True, slots=True)
class Speed:
    """One engine of `tensor` GPUs, in seconds and bytes of one of them.

    `weights` bytes are read in every step, `per_token` for each cached token of a running
    sequence, `per_sequence` for each running sequence; `flops` are those of a new token.
    """

    weights: float
    per_token: float
    per_sequence: float
    bandwidth: float
    flops: float
    flops_per_s: float
    overhead: float
    places: int

    def step(self, running: float, cached: float) -> float:
        """Seconds of a decoding step of `running` sequences with `cached` tokens in all."""
        moved = self.weights + self.per_token * cached + self.per_sequence * running
        return self.overhead + max(moved / self.bandwidth, self.flops * running / self.flops_per_s)


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """Completions of one prompt: its tokens, theirs, and the seconds of its prefill.

    `then` are the completions of another prompt that follow when these have ended: a q' and its
    drafts.
    """

    prompt: int
    lengths: tuple[int, ...]
    prefill: float
    then: PromptGroup | None = None


def decode_seconds(groups: Sequence[PromptGroup], speed: Speed) -> float:
    """Seconds until every completion of every group, and of what follows it, has ended."""
    waiting: deque[tuple[int, int]] = deque()
    prompts: list[PromptGroup] = []
    left: list[int] = []  # completions of each group that have not ended
    ends: list[tuple[int, int, int]] = []  # of what runs: the decoding step, group, length
    now, seconds, cached = 0, 0.0, 0.0

    def arrive(group: PromptGroup) -> float:
        waiting.extend((len(prompts), length) for length in group.lengths)
        prompts.append(group)
        left.append(len(group.lengths))
        return group.prefill

    for group in groups:
        seconds += arrive(group)
    while waiting or ends:
        while waiting and len(ends) < speed.places:
            number, length = waiting.popleft()
            heapq.heappush(ends, (now + length, number, length))
            cached += prompts[number].prompt
        # To the next end: every running sequence grows by a token a step.
        steps, running = ends[0][0] - now, len(ends)
        seconds += steps * speed.step(running, cached + running * steps / 2)
        cached += running * steps
        now += steps
        while ends and ends[0][0] == now:
            _, number, length = heapq.heappop(ends)
            cached -= prompts[number].prompt + length
            left[number] -= 1
            following = prompts[number].then
            if left[number] == 0 and following is not None:
                seconds += arrive(following)
    return seconds


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


_Problem = tuple[PromptGroup, PromptGroup | None]
"""The groups of completions of q, and of q' where there is a second stage."""


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
        config, grpo, rng = self.config, self.config.grpo, random.Random(_SEED)
        # Under dynamic sampling one draw of `batch_multiplier` times the step's problems.
        count = round(grpo.num_prompts_per_step * grpo.batch_multiplier)
        drawn = [self._problem(rng) for _ in range(count)]
        logprobs, training, tokens = self._training(drawn[: grpo.num_prompts_per_step])
        generation, overlapped = self._generation(drawn), is_async_training(config)
        if overlapped:
            # The engines do not run dry between steps: what counts is what one more step adds.
            following = [self._problem(rng) for _ in drawn]
            generation = self._generation([*drawn, *following]) - generation
        groups = [group for each in drawn for group in each if group]
        return Cost(
            generation=generation,
            prefill=sum(group.prefill for group in groups) / engines(config),
            refit=BF16 * self.shape.parameters / (config.igrpo.preflight.refit_gb_per_s * GB),
            logprobs=logprobs,
            training=training,
            validation=self._validations(rng),
            steps=self.steps,
            gpus=machines(config).total,
            sampled_tokens=sum(sum(group.lengths) for group in groups),
            trained_tokens=tokens,
            overlapped=overlapped,
        )

    def other_method(self) -> Cost:
        """GRPO's cost where the config is two-stage, iGRPO's where it is not, the same budget."""
        return replace(self, config=other_method(self.config)).cost()

    def _problem(self, rng: random.Random) -> _Problem:
        feedback, draw = self.config.feedback, self.responses.draw
        question = round(self.context.mean_question)
        drafts = tuple(draw(rng) for _ in range(feedback.num_drafts))
        first = self._group(question, drafts)
        if not feedback.two_stage:
            return first, None
        shown = min(rng.choice(drafts), self.context.draft_room[0.5])
        refined = question + DRAFT_FRAME_TOKENS + shown
        refinements = tuple(draw(rng) for _ in range(feedback.num_refinements))
        return first, self._group(refined, refinements, feedback.num_prompts)

    def _group(self, prompt: int, lengths: tuple[int, ...], prompts: int = 1) -> PromptGroup:
        """Completions of `prompts` prompts of one length."""
        vllm = self.config.policy.generation.vllm
        times = prompts if vllm.get("enable_prefix_caching") is not False else len(lengths)
        rate = self.vllm.tensor * self.gpu.bf16_flops * self.config.igrpo.preflight.prefill_mfu
        return PromptGroup(prompt, lengths, times * forward_flops(self.shape, prompt) / rate)

    def _generation(self, drawn: Sequence[_Problem]) -> float:
        """Seconds of a step's sampling: the slowest engine, with a barrier between the stages
        where the engine is synchronous, in one call with fused drafts."""
        first, second = [a for a, _ in drawn], [b for _, b in drawn if b]
        if self.config.igrpo.draft_prefetch == "fused" or not second:
            return self._slowest([*first, *second])
        if not is_async_rollout(self.config):
            return self._slowest(first) + self._slowest(second)
        return self._slowest([replace(a, then=b) for a, b in zip(first, second, strict=True)])

    def _slowest(self, groups: Sequence[PromptGroup]) -> float:
        """Seconds until the last engine is done with its share."""
        assumed, vllm, count = self.config.igrpo.preflight, self.vllm, engines(self.config)
        prompts = [max(g.prompt, g.then.prompt if g.then else 0) for g in groups]
        speed = Speed(
            weights=vllm.weights,
            per_token=vllm.kv_per_token,
            per_sequence=2 * vllm.state_per_sequence,  # read and written
            bandwidth=self.gpu.bandwidth * assumed.decode_bandwidth,
            flops=matrix_flops_per_token(self.shape) / vllm.tensor,
            flops_per_s=self.gpu.bf16_flops * assumed.prefill_mfu,
            overhead=assumed.decode_overhead_ms / 1000,
            places=max(1, vllm.at_once(sum(prompts) / len(prompts) + self.responses.mean)),
        )
        return max(decode_seconds(groups[i::count], speed) for i in range(min(count, len(groups))))

    def _training(self, drawn: Sequence[_Problem]) -> tuple[float, float, int]:
        """Seconds of the log-prob pass and of the update of the trained rows, and their tokens; a
        refinement's row counts as q'."""
        config, feedback, assumed = self.config, self.config.feedback, self.config.igrpo.preflight
        rows = []
        for first, second in drawn:
            drafts = [first.prompt + n for n in first.lengths] if feedback.trains_drafts else []
            refined = [second.prompt + n for n in second.lengths] if second else []
            rows += drafts + refined[: feedback.num_trained - len(drafts)]
        if not config.policy.sequence_packing.enabled and not config.policy.dynamic.get("enabled"):
            rows = [max(rows)] * len(rows)  # NeMo-RL pads the whole batch to its longest row
        flops = sum(forward_flops(self.shape, row) for row in rows)
        rate = machines(config).training * self.gpu.bf16_flops
        logprobs = 0 if config.loss_fn.force_on_policy_ratio else 1
        logprobs += config.loss_fn.reference_policy_kl_penalty > 0
        # Forward, the gradients of inputs and of weights, which adapters leave out, and a forward
        # pass that is repeated in the backward pass.
        update = (2 if low_rank(config) else 3) + bool(recomputed(config))
        return (
            logprobs * flops / (rate * assumed.prefill_mfu),
            update * flops / (rate * assumed.train_mfu),
            sum(rows),
        )

    def _validations(self, rng: random.Random) -> float:
        """Seconds of all of them."""
        grpo = self.config.grpo
        count = int(grpo.val_at_start) + (self.steps // grpo.val_period if grpo.val_period else 0)
        due = grpo.val_period and self.steps % grpo.val_period == 0
        count += int(grpo.val_at_end and not due)
        question = round(self.context.mean_question)
        problems, k = range(grpo.max_val_samples or 500), self.config.igrpo.validation.samples
        return count * self._slowest(
            [self._group(question, tuple(map(self.responses.draw, [rng] * k))) for _ in problems]
        )


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

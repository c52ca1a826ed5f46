"""Values that follow from others: rows per problem, batch, updates, schedule; and the budget.

    N, G, budget, train_stages -> trained rows per problem = grpo.num_generations_per_prompt
    P * rows / updates = policy.train_global_batch_size
    steps, updates, igrpo.schedule -> policy.scheduler, policy.megatron_cfg.scheduler

Pure functions from a config to a changed copy. A given value that contradicts the derived one is
an error that says what to change.
"""

from __future__ import annotations

import math
from typing import Any

from igrpo_nemo.config.schema import Config
from igrpo_nemo.config.section import UNSET
from igrpo_nemo.errors import UserError

TORCH_SCHEDULERS = "torch.optim.lr_scheduler"


def derived(config: Config) -> Config:
    """The config with every derivable number filled in; raises `UserError` on a contradiction.

    `policy.scheduler` is derived too where the number of problems is known beforehand, which holds
    for generated ones; otherwise `with_problems` does it once the data is loaded.
    """
    config = _with_budget(config)
    config = _with_rows(config)
    config = _with_batch(config)
    generated = config.data.generated
    if generated and generated.num_problems is not None:
        return with_problems(config, generated.num_problems)
    return config


def with_problems(config: Config, num_problems: int) -> Config:
    """The config for this many training problems: checks the batch, derives the schedules."""
    batch = _problems_per_batch(config)
    if num_problems < batch:
        fitting = max(1, int(num_problems / config.grpo.batch_multiplier))
        raise UserError(
            f"a batch has {batch} problems (grpo.num_prompts_per_step times "
            f"grpo.batch_multiplier), but there {'is' if num_problems == 1 else 'are'} only "
            f"{num_problems} to train on: set grpo.num_prompts_per_step={fitting} or give more "
            "problems"
        )
    steps = rollout_steps(config, num_problems)
    config = _with_megatron_schedule(config, steps)
    if config.policy.scheduler is not None:
        return config
    # The embedded engine advances the schedule once per optimizer update, NeMo-RL once per step.
    per_step = config.igrpo.updates_per_rollout if config.igrpo.engine == "local" else 1
    return config.replaced("policy", scheduler=scheduler_stages(config, steps * per_step))


def rollout_steps(config: Config, num_problems: int) -> int:
    """Training steps: whole batches of all epochs, at most `grpo.max_num_steps`.

    Under dynamic sampling a step may draw several batches; this counts one.
    """
    per_epoch = num_problems // _problems_per_batch(config)
    return min(config.grpo.max_num_steps, config.grpo.max_num_epochs * per_epoch)


def scheduler_stages(config: Config, updates: int) -> list[dict[str, Any]]:
    """`igrpo.schedule` over `updates` optimizer updates, in NeMo-RL's list form.

    The rate rises linearly over W = warmup_ratio * updates (rounded up): update i < W runs at
    (i + 1) / (W + 1) of the peak, update W at the peak, and the decay ends at min_lr_ratio.
    """
    schedule = config.igrpo.schedule
    peak = config.policy.optimizer.kwargs.lr
    warmup = warmup_updates(config, updates)
    rest = max(updates - warmup, 1)
    decays: dict[str, dict[str, Any]] = {
        "cosine": _stage("CosineAnnealingLR", T_max=rest, eta_min=peak * schedule.min_lr_ratio),
        "linear": _stage(
            "LinearLR", start_factor=1.0, end_factor=schedule.min_lr_ratio, total_iters=rest
        ),
        "constant": _stage("ConstantLR", factor=1.0, total_iters=rest),
    }
    decay = decays[schedule.decay]
    if warmup < 1:
        return [decay]
    ramp = _stage("LinearLR", start_factor=1 / (warmup + 1), end_factor=1.0, total_iters=warmup)
    return [ramp, decay, {"milestones": [warmup]}]


def warmup_updates(config: Config, updates: int) -> int:
    """How many of `updates` the rate rises over."""
    return min(math.ceil(config.igrpo.schedule.warmup_ratio * updates), updates - 1)


def _with_megatron_schedule(config: Config, steps: int) -> Config:
    """`igrpo.schedule` in Megatron's keys, where these are left open: it counts NeMo-RL's steps.

    Megatron's rate in step i < W of the warm-up is init + (peak - init) i / W: with
    init = peak / (W + 1) that is `scheduler_stages`' (i + 1) / (W + 1) of the peak.
    """
    megatron = config.policy.megatron_cfg
    if megatron is None or megatron.get("scheduler") is None:
        return config
    given = {key: value for key, value in megatron["scheduler"].items() if value is not None}
    warmup = given.get("lr_warmup_iters", warmup_updates(config, steps))
    peak = (megatron.get("optimizer") or {}).get("lr", config.policy.optimizer.kwargs.lr)
    followed = {
        "lr_decay_iters": steps,
        "lr_warmup_iters": warmup,
        "lr_warmup_init": peak / (warmup + 1) if warmup else 0.0,
    }
    scheduler = {**megatron["scheduler"], **followed, **given}
    return config.replaced("policy", megatron_cfg={**megatron, "scheduler": scheduler})


def _stage(name: str, **kwargs: Any) -> dict[str, Any]:
    return {"name": f"{TORCH_SCHEDULERS}.{name}", "kwargs": kwargs}


def _with_budget(config: Config) -> Config:
    igrpo = config.igrpo
    total = igrpo.num_drafts + igrpo.num_refinements
    if igrpo.budget == UNSET:
        return config.replaced("igrpo", budget=total)
    if config.feedback.two_stage and total != igrpo.budget:
        raise UserError(
            f"igrpo.num_drafts={igrpo.num_drafts} + igrpo.num_refinements={igrpo.num_refinements} "
            f"is {total}, but igrpo.budget={igrpo.budget}: make them agree, or set "
            "igrpo.budget=null to take the sum"
        )
    return config


def _with_rows(config: Config) -> Config:
    rows, given = config.feedback.num_trained, config.grpo.num_generations_per_prompt
    if given not in (UNSET, rows):
        igrpo = config.igrpo
        source = (
            f"igrpo.num_drafts={igrpo.num_drafts}, igrpo.num_refinements={igrpo.num_refinements} "
            f"and igrpo.train_stages=[{', '.join(igrpo.train_stages)}]"
            if config.feedback.two_stage
            else f"igrpo.budget={igrpo.budget} with feedback {igrpo.feedback}"
        )
        raise UserError(
            f"grpo.num_generations_per_prompt={given} is the number of trained rows per problem, "
            f"but {source} train {rows}: change those, and leave it null"
        )
    return config.replaced("grpo", num_generations_per_prompt=rows)


def _with_batch(config: Config) -> Config:
    rows = config.grpo.num_prompts_per_step * config.feedback.num_trained
    batch, updates = config.policy.train_global_batch_size, config.igrpo.updates_per_rollout
    if batch == UNSET:
        updates = 1 if updates == UNSET else updates
        if rows % updates:
            raise UserError(
                f"igrpo.updates_per_rollout={updates} does not divide the {rows} trained rows of a "
                f"step ({_product(config)}): set igrpo.updates_per_rollout="
                f"{largest_divisor(rows, updates)}"
            )
        batch = rows // updates
    if rows % batch:
        raise UserError(
            f"policy.train_global_batch_size={batch} does not divide the {rows} trained rows of a "
            f"step ({_product(config)}): set policy.train_global_batch_size="
            f"{largest_divisor(rows, batch)}, or null for one update per rollout"
        )
    if updates not in (UNSET, rows // batch):
        raise UserError(
            f"policy.train_global_batch_size={batch} means {rows // batch} updates per rollout, "
            f"but igrpo.updates_per_rollout={updates}: set one of the two to null"
        )
    config = config.replaced("policy", train_global_batch_size=batch)
    return config.replaced("igrpo", updates_per_rollout=rows // batch)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return next(d for d in range(min(number, max(limit, 1)), 0, -1) if number % d == 0)


def _problems_per_batch(config: Config) -> int:
    return int(config.grpo.num_prompts_per_step * config.grpo.batch_multiplier)


def _product(config: Config) -> str:
    P, rows = config.grpo.num_prompts_per_step, config.feedback.num_trained
    return f"grpo.num_prompts_per_step={P} times {rows} rows per problem"


class RolloutBudget:
    """What a run samples and trains, from a derived config; counts per step unless they say
    otherwise.

    `steps` is None where the number of problems is not known before the data is loaded.
    `max_draws` multiplies the samples of a step at most, under dynamic sampling.
    """

    def __init__(self, config: Config, num_problems: int | None = None) -> None:
        grpo, feedback = config.grpo, config.feedback
        if num_problems is None and config.data.generated:
            num_problems = config.data.generated.num_problems
        self.problems = P = grpo.num_prompts_per_step
        self.drafts, self.refinements = P * feedback.num_drafts, P * feedback.num_refinements
        self.trained_rows = P * grpo.num_generations_per_prompt
        self.updates = config.igrpo.updates_per_rollout
        self.steps = None if num_problems is None else rollout_steps(config, num_problems)
        self.max_new_tokens = config.policy.generation.max_new_tokens
        draws = grpo.dynamic_sampling_max_gen_batches * grpo.batch_multiplier
        self.max_draws = draws if grpo.use_dynamic_sampling else 1

    @property
    def completions(self) -> int:
        return self.drafts + self.refinements

    @property
    def max_tokens(self) -> int:
        """Generated tokens of a step, if every completion used its limit."""
        return self.completions * self.max_new_tokens

    def lines(self) -> list[str]:
        """The budget as text, one quantity a line."""
        lines = [
            f"problems per step: {self.problems}",
            f"completions per step: {self.completions:,} ({self.drafts:,} drafts + "
            f"{self.refinements:,} refinements)",
            f"trained rows per step: {self.trained_rows:,} in {self.updates} update(s)",
            f"generated tokens per step: at most {self.max_tokens:,}",
        ]
        if self.max_draws > 1:
            lines.append(f"dynamic sampling: at most {self.max_draws:g} times these samples")
        if self.steps is None:
            return [*lines, "steps: known when the data is loaded"]
        return [
            *lines,
            f"steps: {self.steps:,}, optimizer updates: {self.steps * self.updates:,}",
            f"completions in all: {self.steps * self.completions:,}",
            f"generated tokens in all: at most {self.steps * self.max_tokens:,}",
        ]

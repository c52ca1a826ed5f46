"""The plan of a run: whether it fits and what it costs, before anything is started.

config -> checks -> shape, data -> estimates -> nearest setting that fits -> Plan

Needs no GPU, no weights and no network, and imports neither torch nor transformers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from igrpo_nemo.config import Config
from igrpo_nemo.config.derive import warmup_updates
from igrpo_nemo.config.launch_checks import launch_problems
from igrpo_nemo.config.machines import machines, parallel, replicas
from igrpo_nemo.preflight.checks import (
    data_notes,
    data_problems,
    gpu_problems,
    shape_problems,
    usable,
)
from igrpo_nemo.preflight.cost import Cost, Estimator
from igrpo_nemo.preflight.estimate import Estimates, Shortage, estimate
from igrpo_nemo.preflight.lengths import responses
from igrpo_nemo.preflight.local_memory import FUSED_FAMILIES
from igrpo_nemo.preflight.nearest import nearest, words
from igrpo_nemo.preflight.parameters import counts
from igrpo_nemo.preflight.shape import Shape, differs_from_folder, shape_of


@dataclass(frozen=True, slots=True)
class Plan:
    """What the preflight found. `problems` is empty where the run fits; each is one line that names
    the key and a value that works. `other` is the cost of the other method at the same budget.
    """

    config: Config
    problems: list[str]
    notes: list[str] = field(default_factory=list)
    shape: Shape | None = None
    parameters: int | None = None
    estimates: Estimates | None = None
    cost: Cost | None = None
    other: Cost | None = None

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def ratio(self) -> float | None:
        """GPU-hours of the two-stage method over GRPO's."""
        if self.cost is None or self.other is None:
            return None
        igrpo, grpo = self.cost, self.other
        if self.config.igrpo.feedback == "none":
            igrpo, grpo = grpo, igrpo
        return igrpo.gpu_hours / grpo.gpu_hours

    @property
    def warmup_steps(self) -> int | None:
        """Steps over which the learning rate rises."""
        steps = self.estimates.steps if self.estimates else None
        if steps is None:
            return None
        return warmup_updates(self.config, steps)

    def text(self) -> str:
        """The plan as tables for a terminal."""
        from igrpo_nemo.preflight.text import plan_text

        return plan_text(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values: bytes, seconds, tokens."""
        from igrpo_nemo.preflight.text import plan_values

        return plan_values(self)


def preflight(
    config: Config,
    *,
    environ: Mapping[str, str] = os.environ,
    machine_memory: int | None = None,
) -> Plan:
    """The plan of a composed config.

    `machine_memory` stands for this machine's in bytes, for the embedded engine. Raises `UserError`
    for a model's config.json or a data file that cannot be read.
    """
    if problems := list(gpu_problems(config)) or launch_problems(config):
        return Plan(config, problems)
    shape = shape_of(config, environ)
    if shape is not None and (problems := list(shape_problems(config, shape))):
        return Plan(config, problems, shape=shape, parameters=counts(shape).total)
    found = estimate(config, shape, machine_memory)
    problems = list(data_problems(config, found.questions, found.context))
    problems += [
        _with_remedy(config, shortage, environ, machine_memory) for shortage in found.shortages
    ]
    plan = Plan(
        config=config,
        problems=problems,
        notes=_notes(config, shape, found),
        shape=shape,
        parameters=None if shape is None else counts(shape).total,
        estimates=found,
    )
    return plan if problems else _with_cost(plan)


def _with_remedy(
    config: Config, shortage: Shortage, environ: Mapping[str, str], machine_memory: int | None
) -> str:
    """The shortage with the mildest change that ends it and makes nothing else worse."""

    def fits(candidate: Config) -> bool:
        if launch_problems(candidate):
            return False
        shape = shape_of(candidate, environ)
        if shape is None or any(shape_problems(candidate, shape)):
            return False
        left = estimate(candidate, shape, machine_memory).shortages
        return shortage.kind not in {each.kind for each in left}

    change = nearest(config, shortage.kind, fits)
    if change is None:
        larger = "a smaller model" if shortage.kind == "local" else "a larger cluster"
        return f"{shortage.text}; no single change or pair of changes helps: use {larger}"
    return f"{shortage.text}: {words(change)}"


def _with_cost(plan: Plan) -> Plan:
    """The plan with both methods' costs, where there is a roofline for them."""
    found, shape = plan.estimates, plan.shape
    assert found is not None
    if shape is None or found.gpu is None or found.vllm is None or found.steps is None:
        return plan
    estimator = Estimator(
        config=plan.config,
        shape=shape,
        gpu=found.gpu,
        vllm=found.vllm,
        context=found.context,
        responses=responses(plan.config),
        steps=found.steps,
    )
    cost = estimator.cost()
    notes = [*plan.notes, *_time_notes(plan.config, cost)]
    return replace(plan, notes=notes, cost=cost, other=estimator.other_method())


def _time_notes(config: Config, cost: Cost) -> Iterator[str]:
    """How many jobs of the site's time limit the run takes."""
    site = config.igrpo.site
    if site.time is None:
        return
    days, _, clock = site.time.rpartition("-")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    limit = (int(days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds - site.save_margin_s
    jobs = math.ceil(cost.hours * 3600 / limit) if limit > 0 else 1
    if jobs > 1:
        yield f"about {jobs} jobs of {site.time}: igrpo launch --chain {jobs}"


def _notes(config: Config, shape: Shape | None, found: Estimates) -> list[str]:
    notes = list(data_notes(config, found.questions, found.context))
    if shape is None:
        notes.append(
            f"{config.policy.model_name} has no config.json here and igrpo.architecture is null: "
            "memory and cost are not estimated"
        )
    elif differs_from_folder(config, shape):
        notes.append(f"igrpo.architecture differs from {shape.source}: the file is believed")
    if found.local is not None and config.igrpo.engine == "nemo_rl_local":
        notes.append(
            "engine nemo_rl_local pads its rows: its memory is estimated as engine local's"
        )
    if shape is not None and config.igrpo.engine != "nemo_rl":
        if shape.family not in FUSED_FAMILIES:
            notes.append(f"the embedded engine's memory is not estimated for {shape.family}")
    if shape is not None and config.igrpo.engine == "nemo_rl" and found.vllm is None:
        notes.append(
            f"generation with policy.generation.backend={config.policy.generation.backend} is not "
            "estimated, so there is no cost"
        )
    notes.extend(_schedule_notes(config, found))
    return notes


def _schedule_notes(config: Config, found: Estimates) -> list[str]:
    notes, steps = [], found.steps
    count = usable(config, found.questions, found.context)
    batch = round(config.grpo.num_prompts_per_step * config.grpo.batch_multiplier)
    if count is not None and count >= batch and count % batch:
        notes.append(f"{count % batch} of {count} problems are left over in each epoch")
    if (
        steps is not None
        and config.checkpointing.enabled
        and config.checkpointing.save_period > steps
    ):
        notes.append(
            f"checkpointing.save_period={config.checkpointing.save_period} is more than the "
            f"{steps} steps: one checkpoint, at the end"
        )
    if config.grpo.use_dynamic_sampling:
        notes.append("dynamic sampling may draw several batches a step: the cost counts one")
    return notes


def layout(config: Config) -> str:
    """How the GPUs are used, in words."""
    split, spread = machines(config), parallel(config)
    sizes = [f"TP {spread.tensor}"]
    sizes += [f"PP {spread.pipeline}"] if spread.pipeline > 1 else []
    sizes += [f"CP {spread.context}"] if spread.context > 1 else []
    name = "Megatron-Core" if spread.backend == "megatron" else "DTensor (FSDP2)"
    where = "also generate" if split.colocated else "train"
    return f"{split.training} {where}: {name}, {', '.join(sizes)}, DP {replicas(config)}"

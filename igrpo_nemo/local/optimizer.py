"""Optimizer and learning-rate schedule from NeMo-RL's keys, for both engines' learners.

`policy.scheduler` is a list of {name, kwargs} closed by {milestones: [...]}, as in NeMo-RL's
DTensor policy (examples/configs/grpo_math_1B.yaml).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import lr_scheduler

from igrpo_nemo.errors import UserError


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], kwargs: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """AdamW, on a GPU in one kernel; `kwargs` are `policy.optimizer`'s."""
    parameters = list(parameters)
    on_gpu = all(parameter.is_cuda for parameter in parameters)
    return torch.optim.AdamW(parameters, **{"fused": True if on_gpu else None, **kwargs})


def build_scheduler(
    optimizer: torch.optim.Optimizer, stages: Sequence[Mapping[str, Any]]
) -> lr_scheduler.LRScheduler:
    """The schedule of `policy.scheduler`: stages {name, kwargs}, joined at the `milestones` (in
    optimizer steps) of an element of their own, as in NeMo-RL's DTensor policy.

    Raises `UserError` for a stage that is not in `torch.optim.lr_scheduler`, and where the number
    of milestones is not one less than the number of stages.
    """
    milestones = [m for stage in stages for m in stage.get("milestones") or ()]
    parts = [_scheduler_stage(optimizer, stage) for stage in stages if stage.get("name")]
    if len(parts) < 2 and not milestones:
        return parts[0] if parts else lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if len(milestones) != len(parts) - 1:
        raise UserError(
            f"policy.scheduler has {len(parts)} stages and {len(milestones)} milestones: give one "
            "milestone less than stages"
        )
    return lr_scheduler.SequentialLR(optimizer, parts, milestones)


def _scheduler_stage(
    optimizer: torch.optim.Optimizer, stage: Mapping[str, Any]
) -> lr_scheduler.LRScheduler:
    # Only names of this one package: a config must not be able to call arbitrary code.
    package, kwargs = "torch.optim.lr_scheduler", stage.get("kwargs") or {}
    prefix, _, attribute = stage["name"].rpartition(".")
    kind = getattr(lr_scheduler, attribute, None) if prefix in ("", package) else None
    if not isinstance(kind, type):
        raise UserError(f"policy.scheduler: {stage['name']!r} is not a class of {package}")
    try:
        return kind(optimizer, **kwargs)
    except (TypeError, ValueError) as error:
        name = f"policy.scheduler: {stage['name']}"
        raise UserError(f"{name} does not accept {kwargs}: {error}") from error


def restore_training(
    optimizer: torch.optim.Optimizer,
    scheduler: lr_scheduler.LRScheduler,
    state: Mapping[str, Any],
    *,
    with_schedule: bool = True,
) -> None:
    """Restores both from `state["optimizer"]` and `state["scheduler"]`; without the latter's
    content, because the schedule has changed, steps this one to the same place."""
    optimizer.load_state_dict(state["optimizer"])
    if with_schedule:
        scheduler.load_state_dict(state["scheduler"])
        return
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    with warnings.catch_warnings():
        # The optimizer's steps were those of the process before.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        for _ in range(state["scheduler"]["last_epoch"]):
            scheduler.step()

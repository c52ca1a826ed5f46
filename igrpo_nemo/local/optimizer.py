"""Optimizer and learning-rate schedule from NeMo-RL's keys.

`policy.optimizer` is {name, kwargs} and `policy.scheduler` a list of {name, kwargs} closed by
{milestones: [...]}, as in NeMo-RL's DTensor policy (examples/configs/grpo_math_1B.yaml).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from igrpo_nemo.errors import UserError


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], name: str, kwargs: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """An optimizer of `torch.optim` by its dotted name, Adam and AdamW on a GPU in one kernel.

    Raises `UserError` for any other name.
    """
    parameters = list(parameters)
    on_gpu = all(parameter.is_cuda for parameter in parameters)
    if on_gpu and name.rpartition(".")[2] in ("Adam", "AdamW"):
        kwargs = {"fused": True, **kwargs}
    return _construct("policy.optimizer", "torch.optim", name, parameters, kwargs)


def build_scheduler(
    optimizer: torch.optim.Optimizer, stages: Sequence[Mapping[str, Any]]
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule of a list of stages, joined at its milestones (in optimizer steps).

    Raises `UserError` for a stage that is not in `torch.optim.lr_scheduler`, and where the number
    of milestones is not one less than the number of stages.
    """
    milestones = [m for stage in stages for m in stage.get("milestones") or ()]
    key, package = "policy.scheduler", "torch.optim.lr_scheduler"
    parts = [
        _construct(key, package, stage["name"], optimizer, stage.get("kwargs") or {})
        for stage in stages
        if stage.get("name")
    ]
    if not parts:
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if len(parts) == 1 and not milestones:
        return parts[0]
    if len(milestones) != len(parts) - 1:
        raise UserError(
            f"policy.scheduler has {len(parts)} stages and {len(milestones)} milestones: give one "
            "milestone less than stages"
        )
    return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones)


def restore_training(
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
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


def _construct(key: str, package: str, name: str, target: Any, kwargs: Mapping[str, Any]) -> Any:
    # Only names of this one package: a config must not be able to call arbitrary code.
    prefix, _, attribute = name.rpartition(".")
    module = torch.optim if package == "torch.optim" else torch.optim.lr_scheduler
    kind = getattr(module, attribute, None) if prefix in ("", package) else None
    if not isinstance(kind, type):
        raise UserError(f"{key}: {name!r} is not a class of {package}, such as {package}.AdamW")
    try:
        return kind(target, **dict(kwargs))
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: {name} does not accept {dict(kwargs)}: {error}") from error

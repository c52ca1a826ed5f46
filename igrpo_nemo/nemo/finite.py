"""A policy that diverges on NeMo-RL ends the run before anything of that step is saved.

    trainer ─ policy.train() ─> loss, gradient norm ─> both finite, or NonFiniteError (exit code 76)

NeMo-RL logs a loss of nan and goes on: its next checkpoint, and all after it, hold nan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from igrpo_nemo.errors import NonFiniteError
from igrpo_nemo.nemo.seam import StepClock
from igrpo_nemo.nemo.versions import newest_checkpoint

# What NeMo-RL's trainers call, the second one where rows travel through TransferQueue.
_UPDATES = ("train", "train_from_meta")


def refuse_non_finite(policy: Any, checkpointer: Any, clock: StepClock) -> list[NonFiniteError]:
    """Has the policy's updates raise `NonFiniteError` where loss or gradient is no finite number.

    The line names the step and the newest checkpoint, which was saved before it and is sound.

    Returns: what was raised, for a trainer that prints errors and returns (the asynchronous one).
    """
    raised: list[NonFiniteError] = []
    for name in _UPDATES:
        if hasattr(policy, name):
            setattr(policy, name, _checked(getattr(policy, name), checkpointer, clock, raised))
    return raised


def _checked(
    update: Callable[..., dict[str, Any]],
    checkpointer: Any,
    clock: StepClock,
    raised: list[NonFiniteError],
) -> Callable[..., dict[str, Any]]:
    def checked(*args: Any, **kwargs: Any) -> dict[str, Any]:
        results = update(*args, **kwargs)
        for key, what in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
            value = results.get(key)
            if value is not None and not bool(torch.isfinite(torch.as_tensor(value)).all()):
                newest = newest_checkpoint(checkpointer)
                good = f"the last good checkpoint is {newest}" if newest else "none was saved"
                error = NonFiniteError(
                    f"step {clock.finished + 1}: the {what} is not finite; {good}; begin a new run "
                    "with a smaller learning rate or policy.max_grad_norm"
                )
                raised.append(error)
                raise error
        return results

    return checked

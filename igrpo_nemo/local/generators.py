"""The states of the global random generators, for a resume that goes on to the last bit."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch


def capture_rng() -> dict[str, object]:
    """States of the global generators (Python, numpy, torch, every CUDA device).

    Plain numbers and tensors only, so that they load with `weights_only=True`.
    """
    name, words, *rest = np.random.get_state()
    states: dict[str, object] = {
        "python": random.getstate(),
        "numpy": (name, np.asarray(words).tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_rng(states: Mapping[str, object]) -> None:
    """Undo `capture_rng`. CUDA states are restored only where as many devices are present."""
    version, words, gauss = states["python"]  # type: ignore[misc]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(states["numpy"])  # type: ignore[arg-type]
    torch.set_rng_state(states["torch"])  # type: ignore[arg-type]
    cuda = states.get("cuda")
    if isinstance(cuda, list) and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)

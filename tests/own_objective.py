"""Objectives of one's own, as a user writes them; each is named by its path."""

from __future__ import annotations

import torch


def tilted(inputs, config):
    """The ratio to the power 1/2, without a clip: it reads both log-probs and a key."""
    ratio_RT = (inputs.logprobs_RT - inputs.old_logprobs_RT).exp()
    return ratio_RT.sqrt() * inputs.advantages_R[:, None] * (1 + config.ratio_clip_max)


def narrow(inputs, config):
    """A value a row, which is refused."""
    return torch.zeros_like(inputs.advantages_R)

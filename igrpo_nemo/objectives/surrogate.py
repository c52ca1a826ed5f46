"""The clipped surrogate: Eqs. 1 and 5, with DAPO, GSPO and Dr. GRPO as settings of it.

    log-probs (new, old, reference), advantages --> per-token objective --> one scalar loss = -J
                                              \\--> sums for the policy/* metrics

The four objectives differ in three places only: the ratio (`_log_ratio`), the clip range
(`_clipped_objective`) and the divisor (`_token_weights`). Masks come from lengths alone.
Shapes: R rows (completions), T tokens, completions start at column 0 and are padded on the right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from igrpo_nemo.errors import UserError

_MAX_LOG_RATIO = 80.0
"""e^80 is still finite in fp32. Beyond, the unselected branch of the clip would send 0 * inf = nan
into the gradient; no sampled token has a ratio anywhere near."""


@dataclass(frozen=True, slots=True)
class SurrogateConfig:
    """NeMo-RL's `loss_fn` keys and two of `igrpo`, which `config/` describes; the defaults
    are the paper's Eq. 5 with beta = 0.

    A larger `ratio_clip_max` than `ratio_clip_min` is DAPO's clip-higher, `token_level_loss` its
    mean (arXiv 2503.14476), `ratio_clip_c` the dual clip (arXiv 1912.09729),
    `sequence_level_importance_ratios` GSPO (arXiv 2507.18071), `constant_length_divisor` Dr. GRPO
    (arXiv 2503.20783), `shaping_gamma` of p / (p + gamma) (arXiv 2506.03106). KL estimators:
    joschu.net/blog/kl-approx.html; k3 is the paper's (Eq. 24), which has no clamps.
    """

    ratio_clip_min: float = 0.2
    ratio_clip_max: float = 0.2
    ratio_clip_c: float | None = None
    token_level_loss: bool = False
    sequence_level_importance_ratios: bool = False
    reference_policy_kl_penalty: float = 0.0
    reference_policy_kl_type: Literal["k1", "k2", "k3"] = "k3"
    kl_input_clamp_value: float | None = None
    kl_output_clamp_value: float | None = None
    constant_length_divisor: int | None = None
    shaping_gamma: float | None = None


@dataclass(frozen=True, slots=True)
class SurrogateInputs:
    """One micro-batch. Entries at or beyond a row's length may hold anything, nan included."""

    logprobs_RT: Tensor
    """log pi(token) under the policy being trained, with gradient."""
    old_logprobs_RT: Tensor
    """The same under the snapshot that sampled the completions."""
    reference_logprobs_RT: Tensor | None
    """The same under the reference policy; needed when beta > 0."""
    advantages_R: Tensor
    lengths_R: Tensor
    """Tokens of each completion."""
    weights_R: Tensor | None = None
    """Each row's share of the loss; None is 1 for all."""
    shaped_R: Tensor | None = None
    """Rows that take the shaped term in the place of the clipped ratio; None is none."""


@dataclass(frozen=True, slots=True)
class Normalizer:
    """Counts over *all* micro-batches of an optimizer step, and over all ranks.

    Every micro-batch divides by these, so that the sum of their losses is the loss of the whole
    batch, however it was cut.
    """

    num_sequences: float
    num_tokens: float
    """Both weighted: a row of weight w counts w times."""

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], weights: Sequence[float] | None = None
    ) -> Normalizer:
        """From the completion lengths, and the weights, of all rows of the optimizer step."""
        if weights is None:
            return cls(num_sequences=len(lengths), num_tokens=sum(lengths))
        tokens = sum(weight * length for weight, length in zip(weights, lengths, strict=True))
        return cls(num_sequences=sum(weights), num_tokens=tokens)


Objective = Callable[[SurrogateInputs, SurrogateConfig], Tensor]
"""Of one's own (`igrpo.objective`): what each token is to maximise, [R, T], with gradient, in the
place of min(r A, clip(r) A). The log-probs that it gets are 0 behind a row's end; what it returns
there is left out. The KL to the reference, the weights of rows and the divisors stay the config's.
"""


def clipped_surrogate(
    inputs: SurrogateInputs,
    config: SurrogateConfig,
    normalizer: Normalizer,
    own: Objective | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of the loss -J, and of the sums behind the policy/* metrics.

    Eq. 5 (Eq. 1 with q' for q), for R = the normalizer's number of sequences:

        J = 1/R sum_j 1/|o_j| sum_t [ min(r A, clip(r, 1 - eps_min, 1 + eps_max) A) - beta D_KL ]

    With groups of equal size, the mean over rows is the paper's mean over the group and then over
    problems. With weights w_j it is sum_j w_j (...) / sum_j w_j. A shaped row has

        p / (p + gamma) A     in the place of     min(r A, clip(r, ...) A),

    with p = pi(o_t | context): its gradient is gamma p / (p + gamma)^2 A d log p, small for tokens
    that are likely already and for those that are hopeless (arXiv 2506.03106).

    Agrees with NeMo-RL v0.7.0's ClippedPGLossFn in value; its gradient of the KL carries a
    score-function term that Eqs. 25-26 lack, so with beta > 0 the gradients differ by that term.

    Returns the loss, a scalar with gradient, and detached scalars for `finish_metrics`:
    `clipped_tokens` are those whose gradient the clip removes, the complement of Eq. 22; `kl_sum`
    is of the estimate of the KL to the reference, without one of r - 1 - log r, the KL between the
    sampling snapshot and the policy.

    Raises ValueError for beta > 0 without reference log-probs, and for shaped rows without
    `shaping_gamma`; UserError where `own` returns another shape.
    """
    mask_RT = _mask(inputs)
    logprobs_RT = _clean(inputs.logprobs_RT, mask_RT)
    old_logprobs_RT = _clean(inputs.old_logprobs_RT.detach(), mask_RT)
    advantages_R1 = inputs.advantages_R.detach().to(logprobs_RT)[:, None]

    shaped_R1 = None if inputs.shaped_R is None else inputs.shaped_R.to(mask_RT.device)[:, None]
    if shaped_R1 is not None:  # no ratio: 1 in the metrics
        old_logprobs_RT = torch.where(shaped_R1, logprobs_RT.detach(), old_logprobs_RT)
    token_log_ratio_RT = logprobs_RT - old_logprobs_RT
    ratio_RT = _log_ratio(token_log_ratio_RT, mask_RT, config).exp()
    if own is None:
        objective_RT = _clipped_objective(ratio_RT, advantages_R1, config)
    else:
        clean = replace(inputs, logprobs_RT=logprobs_RT, old_logprobs_RT=old_logprobs_RT)
        objective_RT = own(clean, config)
        if objective_RT.shape != mask_RT.shape:
            shapes = f"{tuple(objective_RT.shape)} for log-probs of shape {tuple(mask_RT.shape)}"
            raise UserError(f"igrpo.objective returned a tensor of shape {shapes}: a value a token")
        objective_RT = torch.where(mask_RT, objective_RT, 0.0)
    if shaped_R1 is not None:
        shaped_RT = shaped_probability(logprobs_RT, config.shaping_gamma) * advantages_R1
        objective_RT = torch.where(shaped_R1, shaped_RT, objective_RT)
    if inputs.reference_logprobs_RT is not None:
        reference_RT = _clean(inputs.reference_logprobs_RT.detach(), mask_RT)
        kl_RT = _kl(logprobs_RT, reference_RT, config)
        if config.reference_policy_kl_penalty:
            objective_RT = objective_RT - config.reference_policy_kl_penalty * kl_RT
    elif config.reference_policy_kl_penalty:
        raise ValueError("reference_policy_kl_penalty > 0 needs reference_logprobs_RT")
    else:
        kl_RT = torch.expm1(token_log_ratio_RT.detach()) - token_log_ratio_RT.detach()
    weights_RT = _token_weights(mask_RT, config, normalizer, logprobs_RT.dtype)
    if inputs.weights_R is not None:
        weights_RT = weights_RT * inputs.weights_R.to(weights_RT)[:, None]
    loss = -(objective_RT * weights_RT).sum()
    clipped_RT = _is_clipped(ratio_RT, advantages_R1, config) & mask_RT
    return loss, _token_sums(loss, mask_RT, clipped_RT, ratio_RT, kl_RT)


@torch.no_grad()
def _token_sums(
    loss: Tensor, mask_RT: Tensor, clipped_RT: Tensor, ratio_RT: Tensor, kl_RT: Tensor
) -> dict[str, Tensor]:
    return {
        "loss": loss.detach(),
        "tokens": mask_RT.sum().to(loss.dtype),
        "clipped_tokens": clipped_RT.sum().to(loss.dtype),
        "ratio_sum": (ratio_RT * mask_RT).sum(),
        "ratio_max": (ratio_RT * mask_RT).max(),
        "kl_sum": (kl_RT * mask_RT).sum(),
    }


def finish_metrics(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """The metrics of an optimizer step from those of all its micro-batches, one at least.

    `loss`, the means over tokens `policy/clip_fraction`, `policy/ratio_mean` and `policy/kl`
    (nats), and `policy/ratio_max`.
    """
    sums = {name: float(sum(part[name] for part in parts)) for name in parts[0]}
    return {
        "loss": sums["loss"],
        "policy/clip_fraction": sums["clipped_tokens"] / sums["tokens"],
        "policy/ratio_mean": sums["ratio_sum"] / sums["tokens"],
        "policy/ratio_max": float(max(part["ratio_max"] for part in parts)),
        "policy/kl": sums["kl_sum"] / sums["tokens"],
    }


def _mask(inputs: SurrogateInputs) -> Tensor:
    """mask_RT, true on the tokens of each completion."""
    device = inputs.logprobs_RT.device
    positions_T = torch.arange(inputs.logprobs_RT.shape[1], device=device)
    return positions_T < inputs.lengths_R.to(device)[:, None]


def _clean(logprobs_RT: Tensor, mask_RT: Tensor) -> Tensor:
    """At least fp32, and 0 in the padding *before* any arithmetic: a later multiplication by the
    mask would keep nan, and send it into the gradient."""
    logprobs_RT = logprobs_RT.to(torch.promote_types(logprobs_RT.dtype, torch.float32))
    return torch.where(mask_RT, logprobs_RT, 0.0)


def _log_ratio(log_ratio_RT: Tensor, mask_RT: Tensor, config: SurrogateConfig) -> Tensor:
    """log r per token (Eq. 20), or GSPO's log s_i = mean_t log r_it on every token of row i.

    GSPO differentiates s_i through all tokens of the row (arXiv 2507.18071, Eqs. 5-7).
    """
    if config.sequence_level_importance_ratios:
        lengths_R1 = mask_RT.sum(dim=1, keepdim=True).clamp(min=1)
        sequence_R1 = log_ratio_RT.sum(dim=1, keepdim=True) / lengths_R1
        log_ratio_RT = torch.where(mask_RT, sequence_R1, 0.0)
    return log_ratio_RT.clamp(max=_MAX_LOG_RATIO)


def _clipped_objective(ratio_RT: Tensor, advantages_R1: Tensor, config: SurrogateConfig) -> Tensor:
    """min(r A, clip(r) A) (Eq. 21), for A < 0 not below c A when the dual clip is on."""
    clipped_RT = ratio_RT.clamp(1 - config.ratio_clip_min, 1 + config.ratio_clip_max)
    objective_RT = torch.minimum(ratio_RT * advantages_R1, clipped_RT * advantages_R1)
    if config.ratio_clip_c is not None:
        floored_RT = torch.maximum(objective_RT, config.ratio_clip_c * advantages_R1)
        objective_RT = torch.where(advantages_R1 < 0, floored_RT, objective_RT)
    return objective_RT


def shaped_probability(logprobs: Tensor, gamma: float | None) -> Tensor:
    """p / (p + gamma) for p = exp(logprobs), without overflow or cancellation."""
    if gamma is None:
        raise ValueError("shaped rows need shaping_gamma")
    return torch.sigmoid(logprobs - math.log(gamma))


def _is_clipped(ratio_RT: Tensor, advantages_R1: Tensor, config: SurrogateConfig) -> Tensor:
    """Where the clip removes the gradient: 1 - I of Eq. 22 for A != 0, and the dual clip."""
    clipped_RT = (advantages_R1 > 0) & (ratio_RT > 1 + config.ratio_clip_max)
    clipped_RT |= (advantages_R1 < 0) & (ratio_RT < 1 - config.ratio_clip_min)
    if config.ratio_clip_c is not None:
        clipped_RT |= (advantages_R1 < 0) & (ratio_RT > config.ratio_clip_c)
    return clipped_RT


def _kl(logprobs_RT: Tensor, reference_RT: Tensor, config: SurrogateConfig) -> Tensor:
    """Per-token estimate of KL(pi || pi_ref); k3 is rho - log rho - 1, rho = pi_ref/pi (Eq. 24)."""
    log_rho_RT = reference_RT - logprobs_RT
    if (bound := config.kl_input_clamp_value) is not None:
        log_rho_RT = log_rho_RT.clamp(-bound, bound)
    if config.reference_policy_kl_type == "k1":
        kl_RT = -log_rho_RT
    elif config.reference_policy_kl_type == "k2":
        kl_RT = log_rho_RT.square() / 2
    else:
        # expm1 keeps the digits near rho = 1, where this is a difference of nearly equal numbers.
        kl_RT = torch.expm1(log_rho_RT) - log_rho_RT
    if (bound := config.kl_output_clamp_value) is not None:
        kl_RT = kl_RT.clamp(-bound, bound)
    return kl_RT


def _token_weights(
    mask_RT: Tensor, config: SurrogateConfig, normalizer: Normalizer, dtype: torch.dtype
) -> Tensor:
    """What each token's term is multiplied by; 0 in the padding.

    1 / (sequences x own length) for Eq. 5 and GSPO, 1 / tokens for DAPO,
    1 / (sequences x constant) for Dr. GRPO.
    """
    weights_RT = mask_RT.to(dtype)
    if config.token_level_loss:
        return weights_RT / normalizer.num_tokens
    if config.constant_length_divisor is not None:
        return weights_RT / (normalizer.num_sequences * config.constant_length_divisor)
    lengths_R1 = weights_RT.sum(dim=1, keepdim=True).clamp(min=1)
    return weights_RT / (lengths_R1 * normalizer.num_sequences)

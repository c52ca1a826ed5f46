"""`igrpo.preflight`: what the preflight assumes of a run that nobody has seen yet."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from igrpo_nemo.config.section import NonNegativeFloat, PositiveFloat, Section

Fraction = Annotated[float, Field(gt=0, le=1)]


class Preflight(Section):
    """`igrpo.preflight`: read by `igrpo preflight` alone.

    The shares and the overhead are those with which the roofline comes within 15 % of every dense
    bf16 run on NeMo-RL's performance page (`docs/about/performance-summary.md` of v0.5.0, H100).
    """

    response_share: Fraction = 0.4
    """Mean tokens of a completion, as a share of `policy.generation.max_new_tokens`."""
    response_sigma: NonNegativeFloat = 0.8
    """Spread of the log-normal lengths of completions, before they are cut at the limit."""
    train_mfu: Fraction = 0.4
    """Share of the GPU's bf16 peak that training reaches, recomputation counted as work."""
    prefill_mfu: Fraction = 0.5
    """Share of the GPU's bf16 peak that prefill and log-prob passes reach."""
    decode_bandwidth: Fraction = 0.5
    """Share of the GPU's memory bandwidth that decoding reaches."""
    decode_overhead_ms: NonNegativeFloat = 3.0
    """Milliseconds of a decoding step beside its memory traffic: scheduling, sampling, launches."""
    memory_reserve: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of a GPU's memory that is kept free for the allocator's fragmentation."""
    refit_gb_per_s: PositiveFloat = 10.0
    """Gigabytes of weights a second from the trainer to the inference engine."""

"""One prompt, sampled and learned: what a policy must show before it is trained, and before it is
saved.

    first problem -> q -> sampler -> two short completions and their log-probs
                             learner's forward on the same rows -> log-probs

Where the two differ, the ratios of Eq. 5 are wrong and no metric says so: a cap or a scale behind
the head, a window, a cache or a packing that a model family does in its own way.
"""

from __future__ import annotations

from functools import cached_property

import torch

from igrpo_nemo.errors import NonFiniteError, UserError
from igrpo_nemo.local.packing import completion_logprobs
from igrpo_nemo.local.sampler import Sampler, SampleRequest, SamplingParams
from igrpo_nemo.types import Stage, TrainingRow

TOLERANCE = 1e-4
"""Largest difference in nats that rounding explains in float32."""
MEAN_TOLERANCE = 0.05
"""Mean difference in nats that it explains where a sampler has a lower precision."""


class PolicyProbe:
    """Checks of the sampler's policy as it is at each call, in float32, without autocast.

    `temperature` and `packed` are those that the policy is trained with.
    """

    def __init__(
        self, sampler: Sampler, prompt_ids: tuple[int, ...], *, temperature: float, packed: bool
    ) -> None:
        self._sampler, self._prompt_ids = sampler, prompt_ids
        self._temperature, self._packed = temperature, packed

    @cached_property
    def _rows(self) -> list[TrainingRow]:
        request = SampleRequest(self._prompt_ids, 2, "probe")
        params = SamplingParams(16, temperature=self._temperature)
        [completions] = self._sampler.sample([request], params)
        return [TrainingRow("probe", Stage.DRAFT, self._prompt_ids, c, 0.0) for c in completions]

    def check_agreement(self) -> None:
        """Raises `UserError` where a token's log-prob is not the same sampled and learned."""
        sampled = [p for row in self._rows for p in row.completion.logprobs]
        differences = (torch.tensor(sampled) - self._learned()).abs()
        if self._sampler.in_float32:
            difference, tolerance = differences.max().item(), TOLERANCE
        else:
            difference, tolerance = differences.mean().item(), MEAN_TOLERANCE
        if difference > tolerance:
            family = self._sampler.model.config.model_type
            raise UserError(
                f"model_type {family}: sampled and learned log-probs of one prompt differ by "
                f"{difference:.1e} nats (at most {tolerance:.0e} is rounding), so it would be "
                "trained on wrong ratios: try policy.sequence_packing.enabled=false, or train it "
                "with engine=nemo_rl"
            )

    def check_finite(self) -> None:
        """Raises `NonFiniteError` for weights that hold, or lead to, what is no number."""
        for name, parameter in self._sampler.model.named_parameters():
            if not parameter.isfinite().all():
                raise NonFiniteError(f"the weights {name} are not finite after the update")
        if not self._learned().isfinite().all():
            raise NonFiniteError("the policy's log-probs are not finite after the update")

    @torch.no_grad()
    def _learned(self) -> torch.Tensor:
        """The log-probs of all rows' tokens, one after the other, on the CPU."""
        rows, model = self._rows, self._sampler.model
        self._sampler.sleep()
        batch = completion_logprobs(model, rows, temperature=self._temperature, packed=self._packed)
        return torch.cat([logprobs_T.cpu() for logprobs_T in batch.each_row()])

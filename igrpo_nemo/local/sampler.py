"""Sampling completions for prompts: the embedded engine's generation.

    requests -> batches of rows -> decoder (fused, or the model's own) -> logits -> draw
             -> a row ends at EOS, a stop string or its length, and leaves the batch
             -> Completion (token ids, log-probs, text, stop reason)

What a row says depends on its seed key and its number in the request, not on the other rows: up to
the rounding of matrix products, whose kernels may differ with the size of the batch.

Shape legend: R live rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from igrpo_nemo.errors import NonFiniteError, UserError
from igrpo_nemo.local.cached_decoder import CachedBatch, check_cache
from igrpo_nemo.local.fused.decoder import can_fuse
from igrpo_nemo.local.fused.decoding import FusedDecoder
from igrpo_nemo.local.model import context_of
from igrpo_nemo.local.sampling import (
    CompletionText,
    SamplingParams,
    StopStrings,
    UniformTable,
    draw,
)
from igrpo_nemo.run.tokenizer import token_id
from igrpo_nemo.types import Completion, StopReason

__all__ = ["SampleRequest", "Sampler", "SamplingParams"]


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """`num_samples` completions of one prompt. Row i draws from (`seed_key`, i) alone."""

    prompt_ids: tuple[int, ...]
    num_samples: int
    seed_key: str


class DecodingBatch(Protocol):
    """Rows being decoded, numbered prompt by prompt."""

    first_logits: Tensor

    def step(self, tokens_R: Tensor) -> Tensor: ...
    def keep(self, rows: Sequence[int]) -> None: ...


Start = Callable[[Sequence[tuple[int, ...]], Sequence[int]], DecodingBatch]
"""Prefills prompts, given how many rows each is to have."""


@dataclass(slots=True)
class _Row:
    """A completion in the making: number `number` of its request."""

    request: SampleRequest
    number: int
    max_tokens: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    completion: Completion | None = None


@dataclass(frozen=True, slots=True)
class _Call:
    """What one call of the sampler draws from, and what ends a completion."""

    start: Start
    params: SamplingParams
    end_ids: frozenset[int]
    stops: StopStrings


class Sampler:
    """Samples from `model` as it is at each call; `model` may be trained in between.

    Prompt and completion together stay within `max_model_len` and the model's own context. `fused`
    None picks the fused decoder where the model's family allows it. Under autocast sampling runs in
    its precision. Raises `UserError` for a family that neither decoder can sample.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_model_len: int | None = None,
        fused: bool | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        limits = (context_of(model), max_model_len)
        self.max_model_len = min((limit for limit in limits if limit), default=None)
        self._fused = can_fuse(model) if fused is None else fused
        if not self._fused:
            check_cache(model)
        self._text_of = CompletionText(tokenizer)
        self._one_length = bool(getattr(model, "_is_stateful", False))

    @torch.no_grad()
    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[list[Completion]]:
        """The completions of each request, in order.

        `on_progress(rows_done, rows_total)` is called whenever rows have finished; it may raise to
        abandon the call. Completions that reach the context's end count as truncated.

        Raises:
            UserError: a prompt that is empty, or that leaves no room for a token in the context;
                logits that are not finite.
        """
        self._check(requests)
        total, done = sum(request.num_samples for request in requests), 0
        was_training = self.model.training
        self.model.eval()
        # For this call only: the weights change in between, and their memory is needed elsewhere.
        start: Start = (
            FusedDecoder(self.model).start if self._fused else partial(CachedBatch, self.model)
        )
        stops = StopStrings(params.stop_strings, self._text_of)
        call = _Call(start, params, self._end_ids(params), stops)
        results = [self._rows(request, params) for request in requests]
        try:
            for together in self._batches(results):
                for ended in self._run(together, call):
                    done += ended
                    on_progress(done, total)
        finally:
            self.model.train(was_training)
        return [[row.completion for row in rows if row.completion] for rows in results]

    def _rows(self, request: SampleRequest, params: SamplingParams) -> list[_Row]:
        limit = params.max_new_tokens
        if self.max_model_len is not None:
            limit = min(limit, self.max_model_len - len(request.prompt_ids))
        return [_Row(request, number, limit) for number in range(request.num_samples)]

    def _check(self, requests: Sequence[SampleRequest]) -> None:
        for request in requests:
            length, limit = len(request.prompt_ids), self.max_model_len
            if not length:
                raise UserError(f"the prompt of {request.seed_key} is empty")
            if limit is not None and length + 1 > limit:
                raise UserError(
                    f"the prompt of {request.seed_key} has {length} tokens, which leaves no room "
                    f"for a completion in the context of {limit}: shorten it, or raise "
                    "policy.max_total_sequence_length if the model allows more"
                )

    def _end_ids(self, params: SamplingParams) -> frozenset[int]:
        """The tokens that end a completion: the model's, the tokenizer's and the caller's."""
        generation_config = getattr(self.model, "generation_config", None)
        of_model = getattr(generation_config, "eos_token_id", None)
        of_model = [of_model] if isinstance(of_model, int) else list(of_model or ())
        of_tokenizer = token_id(self.tokenizer, "eos")
        ids = {*of_model, *params.stop_token_ids}
        return frozenset(ids if of_tokenizer is None else ids | {of_tokenizer})

    def _batches(self, groups: Sequence[list[_Row]]) -> Iterator[list[list[_Row]]]:
        """Groups of rows that are decoded together: all, or those with prompts of one length."""

        def length_of(rows: list[_Row]) -> int:
            return len(rows[0].request.prompt_ids) if self._one_length else 0

        for _, together in groupby(sorted(filter(None, groups), key=length_of), key=length_of):
            yield list(together)

    def _run(self, groups: Sequence[list[_Row]], call: _Call) -> Iterator[int]:
        """Decodes all rows to their ends; yields how many ended, whenever some did."""
        prompts = [rows[0].request.prompt_ids for rows in groups]
        batch = call.start(prompts, [len(rows) for rows in groups])
        logits_RV = batch.first_logits
        live = [row for rows in groups for row in rows]
        uniforms = None
        if call.params.temperature > 0:
            names = [(row.request.seed_key, row.number) for row in live]
            uniforms = UniformTable(names, logits_RV.device)
        step = 0
        while True:
            draws_R = None if uniforms is None else uniforms.at(step)
            tokens_R, logprobs_R = draw(logits_RV, draws_R, call.params)
            step += 1
            logprobs = logprobs_R.tolist()
            if not all(map(math.isfinite, logprobs)):
                raise NonFiniteError(
                    "the model's logits are not finite: its weights are damaged, or have diverged"
                )
            kept = self._extend(live, tokens_R.tolist(), logprobs, call)
            if len(kept) < len(live):
                yield len(live) - len(kept)
                if not kept:
                    return
                live = [live[i] for i in kept]
                tokens_R = tokens_R[kept]
                batch.keep(kept)
                if uniforms is not None:
                    uniforms.keep(kept)
            logits_RV = batch.step(tokens_R)

    def _extend(
        self, live: Sequence[_Row], tokens: Sequence[int], logprobs: Sequence[float], call: _Call
    ) -> list[int]:
        """Appends a token to every row; the places of those that go on."""
        kept, end_ids, stops = [], call.end_ids, call.stops
        for i, (row, token, logprob) in enumerate(zip(live, tokens, logprobs, strict=True)):
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            if token in end_ids:
                reason = StopReason.EOS
            elif stops.reached(row.token_ids):
                reason = StopReason.STOP_STRING
            elif len(row.token_ids) >= row.max_tokens:
                reason = StopReason.LENGTH
            else:
                kept.append(i)
                continue
            row.completion = self._completion(row, reason)
        return kept

    def _completion(self, row: _Row, reason: StopReason) -> Completion:
        ids = row.token_ids[:-1] if reason is StopReason.EOS else row.token_ids
        return Completion(self._text_of(ids), tuple(row.token_ids), tuple(row.logprobs), reason)

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
    """A completion in the making, and where it belongs."""

    request: int
    number: int
    max_tokens: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    completion: Completion | None = None


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of the sampler: what is asked for, and what ends a completion."""

    requests: Sequence[SampleRequest]
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
        stops = StopStrings(params.stop_strings, self._text_of)
        call = _Call(requests, params, self._end_ids(params), stops)
        results: list[list[Completion]] = [[] for _ in requests]
        total, done = sum(request.num_samples for request in requests), 0
        was_training = self.model.training
        self.model.eval()
        # For this call only: the weights change in between, and their memory is needed elsewhere.
        start: Start = (
            FusedDecoder(self.model).start if self._fused else partial(CachedBatch, self.model)
        )
        try:
            for rows in self._batches(requests, params.max_new_tokens):
                for ended in self._run(start, rows, call):
                    done += ended
                    on_progress(done, total)
                for row in rows:
                    assert row.completion is not None
                    results[row.request].append(row.completion)
        finally:
            self.model.train(was_training)
        return results

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

    def _batches(
        self, requests: Sequence[SampleRequest], max_new_tokens: int
    ) -> Iterator[list[_Row]]:
        """Rows decoded together: all of them, or those whose prompts have one length."""

        def length_of(i: int) -> int:
            return len(requests[i].prompt_ids) if self._one_length else 0

        for _, together in groupby(sorted(range(len(requests)), key=length_of), key=length_of):
            rows = []
            for i in together:
                max_tokens = max_new_tokens
                if self.max_model_len is not None:
                    room = self.max_model_len - len(requests[i].prompt_ids)
                    max_tokens = min(max_tokens, room)
                rows += [_Row(i, n, max_tokens) for n in range(requests[i].num_samples)]
            if rows:
                yield rows

    def _run(self, start: Start, rows: Sequence[_Row], call: _Call) -> Iterator[int]:
        """Decodes the rows to their ends; yields how many ended, whenever some did."""
        batch = start(*_prompts(rows, call.requests))
        logits_RV = batch.first_logits
        uniforms = None
        if call.params.temperature > 0:
            names = [(call.requests[row.request].seed_key, row.number) for row in rows]
            uniforms = UniformTable(names, logits_RV.device)
        live = list(rows)
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


def _prompts(
    rows: Sequence[_Row], requests: Sequence[SampleRequest]
) -> tuple[list[tuple[int, ...]], list[int]]:
    """The prompts of these rows, each once, and how many rows each has."""
    prompts, counts = [], []
    for position, row in enumerate(rows):
        if position and rows[position - 1].request == row.request:
            counts[-1] += 1
        else:
            prompts.append(requests[row.request].prompt_ids)
            counts.append(1)
    return prompts, counts

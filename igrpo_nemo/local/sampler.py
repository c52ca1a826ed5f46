"""Sampling completions for prompts: the embedded engine's generation.

    requests -> batches of rows -> decoder -> some tokens of every row
             -> a row ends at EOS, a stop string or its length, and leaves the batch
             -> Completion (token ids, log-probs, text, stop reason)

Three decoders: `fused` (Llama-like models on a CPU), `static` (models with full attention on a
GPU) and `cached` (any model, through its own cache). What a row says depends on its seed key and
its number in the request, not on the other rows: up to the rounding of matrix products, whose
kernels may differ with the size of the batch.

Shape legend: R live rows, N new tokens of each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from igrpo_nemo.errors import NonFiniteError, UserError
from igrpo_nemo.local.cached_decoder import CachedBatch, check_cache
from igrpo_nemo.local.fused.decoder import can_fuse, can_pack
from igrpo_nemo.local.fused.decoding import FusedBatch
from igrpo_nemo.local.model import context_of
from igrpo_nemo.local.sampling import CompletionText, SamplingParams, StopStrings
from igrpo_nemo.local.static_decoder import StaticDecoder
from igrpo_nemo.run.tokenizer import token_id
from igrpo_nemo.types import Completion, StopReason

__all__ = ["SampleRequest", "Sampler", "SamplingParams"]


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """`num_samples` completions of one prompt. Row i draws from (`seed_key`, i) alone."""

    prompt_ids: tuple[int, ...]
    num_samples: int
    seed_key: str


Decoder = Literal["fused", "static", "cached"]
NOT_FINITE = "the model's logits are not finite: its weights are damaged, or have diverged"


@dataclass(slots=True)
class _Row:
    """A completion in the making: number `number` of its request."""

    request: SampleRequest
    number: int
    max_tokens: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    completion: Completion | None = None


class Sampler:
    """Samples from `model` as it is at each call; `model` may be trained in between.

    Prompt and completion together stay within `max_model_len` and the model's own context.
    `decoder` None picks the fastest for the model's family and device. Under autocast sampling
    runs in its precision. Raises `UserError` for a family that no decoder can sample.
    """

    in_float32 = True
    """Whether it samples in float32 where there is no autocast."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_model_len: int | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        limits = (context_of(model), max_model_len)
        self.max_model_len = min((limit for limit in limits if limit), default=None)
        on_gpu = model.device.type == "cuda" and can_pack(model)
        fastest: Decoder = "static" if on_gpu else "fused" if can_fuse(model) else "cached"
        self.decoder = decoder or fastest
        if self.decoder == "cached":
            check_cache(model)
        self._static = StaticDecoder(model) if self.decoder == "static" else None
        self._text_of = CompletionText(tokenizer)
        self._one_length = bool(getattr(model, "_is_stateful", False))

    @property
    def way(self) -> str:
        """How it samples and why, in words for the start of a run."""
        if self.decoder == "static":
            return "static buffers and CUDA graphs (vLLM is policy.generation.backend=vllm)"
        if self.decoder == "fused":
            return "fused layers"
        family = self.model.config.model_type
        return f"the model's own cache, step by step ({family} has no faster way here)"

    def sleep(self) -> None:
        """To be called before an update, which may need the memory."""
        if self._static is not None:
            self._static.release()

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
        abandon the call. Completions that reach the context's end count as truncated. Raises
        `UserError` for a prompt that is empty or leaves no room for a token in the context, and
        `NonFiniteError` for logits that are not finite.
        """
        self._check(requests)
        total, done = sum(request.num_samples for request in requests), 0
        was_training = self.model.training
        self.model.eval()
        results = [self._rows(request, params) for request in requests]
        longest = max((row.max_tokens for rows in results for row in rows), default=1)
        params = replace(params, max_new_tokens=longest)
        try:
            for ended in self._decode(results, params):
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
        of_model = of_model if isinstance(of_model, list) else [of_model]
        ids = {*of_model, *params.stop_token_ids, token_id(self.tokenizer, "eos")}
        return frozenset(ids - {None})

    def _batches(
        self, groups: Sequence[list[_Row]], params: SamplingParams
    ) -> Iterator[list[list[_Row]]]:
        """Groups of rows that are decoded together: all, or those with prompts of one length;
        as many as fit in memory."""

        def length_of(rows: list[_Row]) -> int:
            return len(rows[0].request.prompt_ids) if self._one_length else 0

        for _, same in groupby(sorted(filter(None, groups), key=length_of), key=length_of):
            together, limit = list(same), None
            if self._static is not None:
                longest = max(len(rows[0].request.prompt_ids) for rows in together)
                limit = self._static.rows_that_fit(longest, params)
            yield from _cut(together, limit) if limit else [together]

    def _decode(self, groups: Sequence[list[_Row]], params: SamplingParams) -> Iterator[int]:
        """Completes all rows; yields how many ended, whenever some did."""
        for together in self._batches(groups, params):
            yield from self._run(together, params)

    def _run(self, groups: Sequence[list[_Row]], params: SamplingParams) -> Iterator[int]:
        """Decodes all rows to their ends; yields how many ended, whenever some did."""
        live = [row for rows in groups for row in rows]
        prompts, counts = [rows[0].request.prompt_ids for rows in groups], list(map(len, groups))
        names = [(row.request.seed_key, row.number) for row in live]
        if self._static is not None:
            batch = self._static.start(prompts, counts, names, params)
        else:
            kind = FusedBatch if self.decoder == "fused" else CachedBatch
            batch = kind(self.model, prompts, counts, names, params)
        end_ids, stops = self._end_ids(params), StopStrings(params.stop_strings, self._text_of)
        while live:
            most = max(row.max_tokens - len(row.token_ids) for row in live)
            tokens_RN, logprobs_RN = batch.advance(most)
            if not np.isfinite(logprobs_RN).all():
                raise NonFiniteError(NOT_FINITE)
            ends_RN = np.isin(tokens_RN, list(end_ids))
            # Tokens of each row up to one that ends it; more than there are where none does.
            to_end_R = np.where(ends_RN.any(1), ends_RN.argmax(1) + 1, ends_RN.shape[1] + 1)
            kept = []
            for i, (row, to_end) in enumerate(zip(live, to_end_R.tolist(), strict=True)):
                tokens = tokens_RN[i].tolist()
                count, reason = _taken(row, tokens, to_end, stops)
                row.token_ids += tokens[:count]
                row.logprobs += logprobs_RN[i, :count].tolist()
                if reason is None:
                    kept.append(i)
                else:
                    row.completion = self._completion(row, reason)
            if len(kept) < len(live):
                yield len(live) - len(kept)
                live = [live[i] for i in kept]
                if live:
                    batch.keep(kept)

    def _completion(self, row: _Row, reason: StopReason) -> Completion:
        ids = row.token_ids[:-1] if reason is StopReason.EOS else row.token_ids
        return Completion(self._text_of(ids), tuple(row.token_ids), tuple(row.logprobs), reason)


def _cut(groups: Sequence[list[_Row]], limit: int) -> Iterator[list[list[_Row]]]:
    """The groups in parts of at most `limit` rows; a group may be divided."""
    part: list[list[_Row]] = []
    room = limit
    for rows in groups:
        while rows:
            part.append(rows[:room])
            room, rows = room - len(rows[:room]), rows[room:]
            if room == 0:
                yield part
                part, room = [], limit
    if part:
        yield part


def _taken(
    row: _Row, tokens: Sequence[int], to_end: int, stops: StopStrings
) -> tuple[int, StopReason | None]:
    """How many of the new tokens are the row's, and why it ends with them; None: it goes on."""
    room = row.max_tokens - len(row.token_ids)
    count = min(len(tokens), to_end, room)
    ended = count == to_end
    stopped = stops.first(row.token_ids, tokens[: count - ended])
    if stopped is not None:
        return stopped, StopReason.STOP_STRING
    if ended:
        return count, StopReason.EOS
    return count, StopReason.LENGTH if count == room else None

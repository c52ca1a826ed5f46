"""Drawing tokens: a sampling distribution, reproducible draws from it, and where they end.

    logits -> softmax(logits / temperature) -> top-k -> top-p -> inverse CDF at the row's uniform

The uniforms of a row are a function of its name alone, so a draw depends neither on the batch the
row is in nor on what was drawn elsewhere.

Shape legend: R rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from igrpo_nemo.config import Config
from igrpo_nemo.errors import UserError
from igrpo_nemo.run.tokenizer import special_tags


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are drawn.

    `temperature` 0 is greedy decoding. `top_k` None and `top_p` 1 leave the softmax as it is.
    Sampling stops at an end-of-sequence token, at one of `stop_token_ids`, or when one of
    `stop_strings` appears in the completion's text.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: use 1 or more")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(f"temperature is {self.temperature}: use 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: use a value above 0 and up to 1")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}: use 1 or more, or null for no limit")
        if "" in self.stop_strings:
            raise UserError("an empty stop string would stop every completion: remove it")


def sampling_params(config: Config) -> SamplingParams:
    """`policy.generation`, for both stages."""
    generation = config.policy.generation
    return SamplingParams(
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.temperature,
        top_p=generation.top_p,
        top_k=generation.top_k,
        stop_strings=tuple(generation.stop_strings or ()),
        stop_token_ids=tuple(generation.stop_token_ids or ()),
    )


class UniformTable:
    """The uniforms in [0, 1) of a batch of rows, step after step (Philox, counter-based).

    Those of a row follow from its name, (seed key, number), alone.
    """

    BLOCK = 256

    def __init__(self, names: Sequence[tuple[str, int]]) -> None:
        texts = (f"{key}\0{row}".encode() for key, row in names)
        digests = (hashlib.blake2b(text, digest_size=16).digest() for text in texts)
        keys = (np.frombuffer(digest, dtype=np.uint64) for digest in digests)
        self._generators = [np.random.Generator(np.random.Philox(key=key)) for key in keys]

    def keep(self, rows: Sequence[int]) -> None:
        self._generators = [self._generators[i] for i in rows]

    def next_block(self) -> Tensor:
        """The next uniforms of all rows, on the CPU: float64 [R, BLOCK]."""
        return torch.from_numpy(np.stack([each.random(self.BLOCK) for each in self._generators]))


class StepwiseBatch:
    """Rows being decoded one token at a time, numbered prompt by prompt.

    A decoder has `_begin`, `_next` and `_keep`. `names` are (seed key, number) of each row.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[tuple[int, ...]],
        rows_per_prompt: Sequence[int],
        names: Sequence[tuple[str, int]],
        params: SamplingParams,
    ) -> None:
        self._model, self._params, self._device = model, params, model.device
        self._uniforms = UniformTable(names) if params.temperature > 0 else None
        self._table_RB = torch.empty(len(names), 0)
        self._drawn, self._tokens_R = 0, torch.empty(0)
        self._logits_RV = self._begin(prompts, rows_per_prompt)

    def advance(self, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The next tokens of the live rows and their log-probs, here one of each: [R, 1]."""
        if self._drawn:
            self._logits_RV = self._next(self._tokens_R)
        column, uniforms_R = self._drawn % UniformTable.BLOCK, None
        if self._uniforms is not None:
            if column == 0:
                self._table_RB = self._uniforms.next_block().to(self._device)
            uniforms_R = self._table_RB[:, column]
        self._tokens_R, logprobs_R = draw(self._logits_RV, uniforms_R, self._params)
        self._drawn += 1
        return self._tokens_R[:, None].cpu().numpy(), logprobs_R[:, None].cpu().numpy()

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these of the live rows, renumbered in this order (which is ascending)."""
        self._tokens_R = self._tokens_R[list(rows)]
        if self._uniforms is not None:
            self._uniforms.keep(rows)
            self._table_RB = self._table_RB[list(rows)]
        self._keep(rows)

    def _begin(self, prompts: Sequence[tuple[int, ...]], rows_per_prompt: Sequence[int]) -> Tensor:
        """Reads the prompts; the logits of each row's first token: [R, V]."""
        raise NotImplementedError

    def _next(self, tokens_R: Tensor) -> Tensor:
        """Appends a token to every live row; the logits of the next one: [R, V]."""
        raise NotImplementedError

    def _keep(self, rows: Sequence[int]) -> None: ...


def draw(
    logits_RV: Tensor, uniforms_R: Tensor | None, params: SamplingParams
) -> tuple[Tensor, Tensor]:
    """Tokens [R] and their log-probs [R] in nats under the untruncated softmax(logits / T).

    Without `uniforms_R` decoding is greedy, with log-probs at temperature 1. Among equal logits the
    lowest id comes first, in top-k and top-p as in greedy decoding.
    """
    scaled_RV = logits_RV.float()
    if params.temperature not in (0.0, 1.0):
        scaled_RV = scaled_RV / params.temperature
    logprobs_RV = torch.log_softmax(scaled_RV, dim=-1)
    if uniforms_R is None:
        tokens_R = logprobs_RV.argmax(dim=-1)
    else:
        tokens_R = _inverse_cdf(logprobs_RV, uniforms_R, params)
    return tokens_R, logprobs_RV.gather(1, tokens_R[:, None])[:, 0]


def _inverse_cdf(logprobs_RV: Tensor, uniforms_R: Tensor, params: SamplingParams) -> Tensor:
    V = logprobs_RV.shape[1]
    # Sums in float64: in float32 the tail of a large vocabulary would be lost.
    probs_RV = logprobs_RV.double().exp_()
    order_RV = None
    if params.top_p < 1 or (params.top_k is not None and params.top_k < V):
        probs_RV, order_RV = probs_RV.sort(dim=-1, descending=True, stable=True)
        if params.top_k is not None:
            probs_RV[:, params.top_k :] = 0
        if params.top_p < 1:
            # The smallest set of most probable tokens that reaches top_p of what top-k left.
            before_RV = probs_RV.cumsum(-1) - probs_RV
            probs_RV[before_RV >= params.top_p * probs_RV.sum(-1, keepdim=True)] = 0
    cdf_RV = probs_RV.cumsum(-1)
    targets_R1 = uniforms_R[:, None] * cdf_RV[:, -1:]
    # right=True skips tokens of probability 0, whose CDF equals their predecessor's.
    picks_R1 = torch.searchsorted(cdf_RV, targets_R1, right=True)
    # u * total may round up to the total: then the last token that has a probability.
    last_R1 = (cdf_RV < cdf_RV[:, -1:]).sum(-1, keepdim=True)
    picks_R1 = torch.minimum(picks_R1, last_R1)
    if order_RV is not None:
        picks_R1 = order_RV.gather(1, picks_R1)
    return picks_R1[:, 0]


class CompletionText:
    """Decodes completions without control tokens.

    The tags of thinking and answer are text, also for a tokenizer that counts them among its
    control tokens: without them no completion would be well formed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._decode, tags = tokenizer.decode, special_tags(tokenizer)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {number for number, token in added.items() if token.special}
        self._left_out = special - tags.keys() if tags else frozenset()
        self._options = {"skip_special_tokens": not tags, "clean_up_tokenization_spaces": False}

    def __call__(self, token_ids: Sequence[int]) -> str:
        shown = [token for token in token_ids if token not in self._left_out]
        return str(self._decode(shown, **self._options))


class StopStrings:
    """Says whether the newest token of a completion has completed a stop string.

    A stop string may begin anywhere in a token and end anywhere in another one. Only the last few
    tokens are decoded: as many as the longest stop string has bytes, since a token that shows in
    the text stands for a byte or more, and one more for a character that is cut in half. And only
    where the newest token holds the last character of a stop string, since no tokenizer splits a
    visible ASCII character.
    """

    def __init__(self, strings: Sequence[str], text_of: CompletionText) -> None:
        self._strings, self._text_of = tuple(strings), text_of
        self._window = max((len(string.encode()) for string in strings), default=0) + 1
        self._last = {string[-1] for string in strings}
        self._selective = all(c.isascii() and c.isprintable() and c != " " for c in self._last)
        self._may_end: dict[int, bool] = {}

    def reached(self, token_ids: Sequence[int]) -> bool:
        newest = token_ids[-1]
        if self._selective and newest not in self._may_end:
            self._may_end[newest] = not self._last.isdisjoint(self._text_of([newest]))
        if not self._strings or not self._may_end.get(newest, True):
            return False
        tail = self._text_of(token_ids[-self._window :])
        return any(string in tail for string in self._strings)

    def first(self, token_ids: Sequence[int], following: Sequence[int]) -> int | None:
        """How many of the tokens that follow `token_ids` complete a stop string, if they do."""
        if not self._strings:
            return None
        ids = list(token_ids[-self._window :])
        for count, token in enumerate(following, 1):
            ids.append(token)
            if self.reached(ids):
                return count
        return None

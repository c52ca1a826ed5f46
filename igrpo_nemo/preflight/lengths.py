"""Tokens of prompts and completions: what is assumed of a run that nobody has seen yet.

questions + template        -> q
responses (log-normal, cut) -> drafts and refinements
context - new tokens - q    -> room for the draft in q', and how many drafts are shortened
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

from igrpo_nemo.config import Config
from igrpo_nemo.preflight.questions import DRAFT_FRAME_TOKENS, Questions, template_tokens


@dataclass(frozen=True, slots=True)
class Responses:
    """Log-normal lengths, cut at `limit`; with `mu` the mean after the cut is `mean`."""

    mean: float
    limit: int
    mu: float
    sigma: float

    def above(self, tokens: float) -> float:
        """Share of completions that would be longer than this, were they not cut at the limit."""
        if self.sigma == 0:
            return float(math.exp(self.mu) > tokens)
        return 0.5 * math.erfc((math.log(max(tokens, 1)) - self.mu) / (self.sigma * math.sqrt(2)))

    def draw(self, rng: random.Random) -> int:
        """The length of one completion."""
        return max(1, min(self.limit, round(rng.lognormvariate(self.mu, self.sigma))))


def responses(config: Config) -> Responses:
    """The lengths that `igrpo.preflight` assumes."""
    assumed, limit = config.igrpo.preflight, config.policy.generation.max_new_tokens
    mean, sigma = assumed.response_share * limit, assumed.response_sigma
    if sigma == 0 or assumed.response_share == 1:
        return Responses(mean, limit, math.log(mean), 0.0)
    low, high = math.log(mean) - sigma**2, math.log(limit) + 8 * sigma
    for _ in range(60):
        middle = (low + high) / 2
        if _mean_when_cut(middle, sigma, limit) < mean:
            low = middle
        else:
            high = middle
    return Responses(mean, limit, low, sigma)


def _mean_when_cut(mu: float, sigma: float, limit: int) -> float:
    """E[min(X, limit)] of a log-normal X."""
    z = (math.log(limit) - mu) / sigma
    below = math.exp(mu + sigma**2 / 2) * _normal_cdf(z - sigma)
    return below + limit * (1 - _normal_cdf(z))


def _normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


@dataclass(frozen=True, slots=True)
class Context:
    """Who gets which tokens of the context. `draft_room` is what q leaves to the draft in q', by
    the quantile of q; `clipped` the share of drafts longer than that at the median q."""

    total: int
    new_tokens: int
    template: int
    question_limit: int
    question: Mapping[float, int]
    mean_question: float
    draft_room: Mapping[float, int]
    clipped: float
    mean_draft: float
    longest_prompt: int

    @property
    def mean_refinement_prompt(self) -> float:
        """Mean tokens of q'."""
        return self.mean_question + DRAFT_FRAME_TOKENS + self.mean_draft


def context(config: Config, asked: Questions) -> Context:
    """The token budget of q and q'."""
    total, new = config.policy.max_total_sequence_length, config.policy.generation.max_new_tokens
    limit, template = config.data.max_input_seq_length, template_tokens(config)
    lengths = responses(config)
    question = {q: min(tokens + template, limit) for q, tokens in asked.tokens.items()}
    room = {q: max(0, total - new - n - DRAFT_FRAME_TOKENS) for q, n in question.items()}
    two_stages = config.igrpo.feedback != "none"
    longest = total - new if two_stages else question[1.0]
    return Context(
        total=total,
        new_tokens=new,
        template=template,
        question_limit=limit,
        question=question,
        mean_question=min(asked.mean + template, limit),
        draft_room=room,
        clipped=0.0 if room[0.5] >= new else lengths.above(room[0.5]),
        mean_draft=min(lengths.mean, room[0.5]),
        longest_prompt=min(longest, question[1.0] + new + DRAFT_FRAME_TOKENS),
    )

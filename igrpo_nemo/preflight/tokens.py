"""Tokens of prompts and completions of a run that nobody has seen yet.

data at hand -> characters, or tokens where the model's tokenizer.json is -> questions' quantiles
known sets   -> quantiles counted beforehand (`KNOWN`)
questions + template        -> q
responses (log-normal, cut) -> drafts and refinements
context - new tokens - q    -> room for the draft in q', and how many drafts are shortened
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

import yaml

from igrpo_nemo.config import Config
from igrpo_nemo.config.nemo_keys import Dataset
from igrpo_nemo.data.catalog import find_source, locate
from igrpo_nemo.data.columns import QUESTION_KEYS, Unusable, question_text, value_at
from igrpo_nemo.data.rows import Row, read_file
from igrpo_nemo.files import model_folder
from igrpo_nemo.run.problems import expected_of, held_out
from igrpo_nemo.tasks import TASKS

QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)

CHARACTERS_PER_TOKEN = 2.8
"""Of MATH's questions under Qwen2.5's vocabulary (2.79); GSM8K's have 3.9, LaTeX has fewer."""
PROMPT_CHARACTERS_PER_TOKEN = 4.86
"""Of the paper's system prompt under the same vocabulary: 520 characters, 107 tokens."""
CHAT_TEMPLATE_TOKENS = 13
"""ChatML's role tokens around system prompt and question."""
DRAFT_FRAME_TOKENS = 12
"""What stands around the draft in q': `igrpo.prompt.draft_intro` and the two tags."""

SAMPLED_ROWS = 1000
"""Rows that are tokenised, evenly spaced, beside the longest ones."""


@dataclass(frozen=True, slots=True)
class Questions:
    """`count` problems (None: not known) and the tokens of their questions.

    `tokens` by quantile; `longest` are the longest questions, descending, none where others stand
    in for them; `source` says how they were counted.
    """

    count: int | None
    tokens: Mapping[float, int]
    mean: float
    source: str
    longest: tuple[int, ...] = ()

    def above(self, limit: int) -> int | None:
        """Questions of more tokens than `limit`; None where their number is not known."""
        if self.tokens[1.0] <= limit:
            return 0
        if self.longest and self.longest[-1] <= limit:
            return sum(tokens > limit for tokens in self.longest)
        return None

    def said_above(self, limit: int) -> str | None:
        """The same in words; None where there is none."""
        count = self.above(limit)
        if count is None and self.longest:
            return f"at least {len(self.longest)}"
        return str(count) if count else None


_STAND_IN = "not at hand: MATH's questions stand in"

KNOWN: dict[str, Questions] = {
    name: Questions(
        count=None,
        source="counted beforehand with Qwen2.5's vocabulary",
        **{**facts, "longest": tuple(facts["longest"])},
    )
    for name, facts in yaml.safe_load(
        Path(__file__).with_name("questions.yaml").read_text()
    ).items()
}
"""The training splits whose questions were counted beforehand."""


def questions(config: Config, environ: Mapping[str, str] = os.environ) -> Questions:
    """The training problems of a config. Reads a file where one is named; downloads nothing.

    Raises `UserError` for a file that cannot be read.
    """
    sets = [_questions_of(config, train, environ) for train in config.data.train_sets]
    return sets[0] if config.data.only_set else _together(sets)


def _together(sets: Sequence[Questions]) -> Questions:
    """Of a mixture, whatever its weights: a quantile is that of the set with the longest."""
    counts = [each.count for each in sets if each.count is not None]
    return Questions(
        count=sum(counts) if len(counts) == len(sets) else None,
        tokens={quantile: max(each.tokens[quantile] for each in sets) for quantile in QUANTILES},
        mean=sum(each.mean for each in sets) / len(sets),
        source="; ".join(dict.fromkeys(each.source for each in sets)),
        longest=tuple(sorted((n for each in sets for n in each.longest), reverse=True)[:16]),
    )


def _questions_of(config: Config, train: Dataset, environ: Mapping[str, str]) -> Questions:
    source = find_source(train.dataset_name)
    name = source.name if source else train.dataset_name
    if train.dataset_name in TASKS:
        # A character is a token.
        task, rng = TASKS[train.dataset_name](), random.Random(0)
        lengths = [len(task.sample(rng, size).question) for size in train.lengths or [6]]
        found = replace(_counted(lengths, "generated"), longest=(max(lengths),))
    elif name in KNOWN and not train.data_path and train.split in (None, "train"):
        found = KNOWN[name]
    else:
        found = _from_file(config, train, environ)
    count = expected_of(config, train)
    if count is None and found.count is not None:
        count = found.count - held_out(config, train, found.count)
    return replace(found, count=count)


def _from_file(config: Config, train: Dataset, environ: Mapping[str, str]) -> Questions:
    path = _local_file(train)
    rows = [] if path is None else read_file(path)
    texts = list(_questions(rows, train))
    if path is None or not texts:
        count = len(rows) if path else None
        return replace(KNOWN["math"], count=count, source=_STAND_IN, longest=())
    tokenizer = model_folder(config.policy.tokenizer.name, environ)
    file = tokenizer / "tokenizer.json" if tokenizer else None
    if file is not None and file.is_file():
        lengths, how = _token_lengths(texts, file), f"counted in {path.name} with its tokenizer"
    else:
        lengths = [round(len(text) / CHARACTERS_PER_TOKEN) for text in texts]
        how = f"counted in {path.name}, {CHARACTERS_PER_TOKEN:g} characters a token"
    return replace(_counted(lengths, how), count=len(texts))


def _counted(lengths: Sequence[int], source: str) -> Questions:
    ordered, last = sorted(lengths), len(lengths) - 1
    tokens = {quantile: ordered[round(quantile * last)] for quantile in QUANTILES}
    mean, longest = sum(lengths) / len(lengths), tuple(reversed(ordered[-16:]))
    return Questions(None, tokens, mean, source, longest)


def _local_file(train: Dataset) -> Path | None:
    """The file of a data set where there is one on this disk."""
    if train.data_path:
        path = Path(train.data_path)
        return path if path.is_file() or path.suffix else None
    path = Path(train.dataset_name)
    if path.is_file():
        return path
    source = find_source(train.dataset_name)
    return None if source is None else locate(source, train.split)


def _questions(rows: Sequence[Row], train: Dataset) -> Iterator[str]:
    keys = (train.input_key,) if train.input_key else QUESTION_KEYS
    for row in rows:
        with suppress(Unusable):
            values = (value_at(row, key) for key in keys)
            yield question_text(next((each for each in values if each is not None), None))


def _token_lengths(texts: Sequence[str], tokenizer: Path) -> list[int]:
    """Tokens of an even sample of the texts and of the longest ones."""
    from tokenizers import Tokenizer

    longest = sorted(texts, key=len)[-32:]
    step = max(1, len(texts) // SAMPLED_ROWS)
    encoded = Tokenizer.from_file(str(tokenizer)).encode_batch([*texts[::step], *longest])
    return [len(each.ids) for each in encoded]


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
    normal = NormalDist()

    def mean_when_cut(mu: float) -> float:
        """E[min(X, limit)] of a log-normal X."""
        z = (math.log(limit) - mu) / sigma
        below = math.exp(mu + sigma**2 / 2) * normal.cdf(z - sigma)
        return below + limit * (1 - normal.cdf(z))

    low, high = math.log(mean) - sigma**2, math.log(limit) + 8 * sigma
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_when_cut(middle) < mean else (low, middle)
    return Responses(mean, limit, low, sigma)


@dataclass(frozen=True, slots=True)
class Context:
    """Who gets which tokens of the context. `draft_room` is what q leaves to the draft in q', by
    the quantile of q; `clipped` the share of drafts longer than that at the median q."""

    total: int
    new_tokens: int
    template: int
    question: Mapping[float, int]
    mean_question: float
    draft_room: Mapping[float, int]
    clipped: float
    mean_draft: float

    @property
    def mean_refinement_prompt(self) -> float:
        """Mean tokens of q'."""
        return self.mean_question + DRAFT_FRAME_TOKENS + self.mean_draft


def context(config: Config, asked: Questions) -> Context:
    """The token budget of q and q'."""
    total, new = config.policy.max_total_sequence_length, config.policy.generation.max_new_tokens
    limit, lengths = config.data.max_input_seq_length, responses(config)
    system = len(config.igrpo.prompt.system) / PROMPT_CHARACTERS_PER_TOKEN
    template = CHAT_TEMPLATE_TOKENS + round(system)
    question = {q: min(tokens + template, limit) for q, tokens in asked.tokens.items()}
    room = {q: max(0, total - new - n - DRAFT_FRAME_TOKENS) for q, n in question.items()}
    return Context(
        total=total,
        new_tokens=new,
        template=template,
        question=question,
        mean_question=min(asked.mean + template, limit),
        draft_room=room,
        clipped=0.0 if room[0.5] >= new else lengths.above(room[0.5]),
        mean_draft=min(lengths.mean, room[0.5]),
    )


def usable(config: Config, asked: Questions, budget: Context) -> int | None:
    """Problems that are trained on: those whose question fits."""
    if asked.count is None or not config.igrpo.drop_overlong_prompts:
        return asked.count
    above = asked.above(config.data.max_input_seq_length - budget.template)
    return asked.count - (above or 0)

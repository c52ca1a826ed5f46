"""Scored answers to the bare prompt q, as at inference: what validation and evaluation ask for.

(problem, seed key) -> q -> sampler -> scorer -> Group
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from igrpo_nemo.local.sampler import Sampler, SampleRequest, SamplingParams
from igrpo_nemo.prompts import PromptBuilder
from igrpo_nemo.rewards import Scorer, ScoreRequest
from igrpo_nemo.types import Group, Problem, Stage

Progress = Callable[[int, int], None]
"""Called with (completions finished, completions in all)."""


@dataclass(frozen=True, slots=True)
class Answerer:
    """Asks a policy bare questions and scores what it answers."""

    sampler: Sampler
    prompts: PromptBuilder
    scorer: Scorer
    params: SamplingParams

    def __call__(
        self,
        keyed: Sequence[tuple[Problem, str]],
        num_samples: int = 1,
        on_progress: Progress = lambda done, total: None,
    ) -> list[Group]:
        """A group of answers per (problem, seed key), in order."""
        prompts = [self.prompts.question(problem) for problem, _ in keyed]
        requests = [
            SampleRequest(prompt.token_ids, num_samples, key)
            for prompt, (_, key) in zip(prompts, keyed, strict=True)
        ]
        completions = self.sampler.sample(requests, self.params, on_progress=on_progress)
        asked = [
            ScoreRequest(problem, row.text, prompt.thinking_open, row.truncated)
            for (problem, _), prompt, rows in zip(keyed, prompts, completions, strict=True)
            for row in rows
        ]
        scores = iter(self.scorer(asked))
        return [
            Group(problem, Stage.DRAFT, prompt, tuple(rows), tuple(islice(scores, len(rows))))
            for (problem, _), prompt, rows in zip(keyed, prompts, completions, strict=True)
        ]


def single_shot(
    problems: Sequence[Problem],
    sampler: Sampler,
    prompts: PromptBuilder,
    scorer: Scorer,
    params: SamplingParams,
    seed_key: str,
    *,
    num_samples: int = 1,
    on_progress: Progress = lambda done, total: None,
) -> list[Group]:
    """One group of `num_samples` scored answers to q per problem, in order.

    The draws depend on `seed_key` and the problem's id alone. Raises `UserError` for a problem
    whose q does not fit.
    """
    keyed = [(problem, f"{seed_key}/{problem.id}") for problem in problems]
    return Answerer(sampler, prompts, scorer, params)(keyed, num_samples, on_progress)

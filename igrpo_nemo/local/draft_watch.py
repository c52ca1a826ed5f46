"""`igrpo.short_circuit` in the sampler's loop: drafts are scored while others are decoded.

    sampler ── drafts that ended ──> DraftWatch ── a wave every few steps ──> scoring thread
            <── drafts to give up ──            <── the scores of the wave before ──

A wave's scores are waited for where the next one is sent, so what is given up depends on decoding
steps and never on the clock: a run that is repeated or resumed gives up the same drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from igrpo_nemo.environment import Attempt, TwoStageEnvironment
from igrpo_nemo.feedback import NextPrompt
from igrpo_nemo.local.sampler import Ended
from igrpo_nemo.short_circuit import ShortCircuit
from igrpo_nemo.types import Completion, Group, Problem, Score, Stage

_WAVES = 128
"""Waves over the longest completion: a draft is given up at most 2/128 of that length late."""


class DraftWatch:
    """Watches one Stage 1: `drafts[i]` is the problem and q of the sampler's request i.

    A context manager; the scoring thread ends with it. What scoring raises is raised where the
    scores are waited for.
    """

    def __init__(
        self,
        rule: ShortCircuit,
        environment: TwoStageEnvironment,
        drafts: Sequence[tuple[Problem, NextPrompt]],
        max_new_tokens: int,
    ) -> None:
        self._rule = rule
        self._environment = environment
        self._drafts = drafts
        self._interval = max(1, max_new_tokens // _WAVES)
        self._steps = 0
        self._unscored: list[Ended] = []
        self._wave: tuple[list[Ended], Future[list[Score]]] | None = None
        self._unbeatable: list[list[bool | None]] = [
            [None] * following.num_samples for _, following in drafts
        ]
        self._finished: list[dict[int, tuple[Completion, Score]]] = [{} for _ in drafts]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draft-scores")

    def __enter__(self) -> DraftWatch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __call__(self, ended: Sequence[Ended]) -> list[tuple[int, int]]:
        """The sampler's `Watch`: after a decoding step, the drafts that no longer matter."""
        self._unscored += ended
        self._steps += 1
        if self._steps % self._interval:
            return []
        given_up = self._receive()
        if self._unscored:
            wave, self._unscored = self._unscored, []
            self._wave = wave, self._thread.submit(self._score, wave)
        return given_up

    def groups(self) -> list[Group]:
        """After sampling: each problem's finished drafts, in order, all of them scored."""
        self._receive()
        self._enter(self._unscored, self._score(self._unscored))
        groups = []
        for (problem, following), finished in zip(self._drafts, self._finished, strict=True):
            pairs = [finished[number] for number in sorted(finished)]
            completions = tuple(completion for completion, _ in pairs)
            scores = tuple(score for _, score in pairs)
            groups.append(Group(problem, Stage.DRAFT, following.prompt, completions, scores))
        return groups

    def _receive(self) -> list[tuple[int, int]]:
        """Enters the scores of the wave that is out; what they make superfluous."""
        if self._wave is None:
            return []
        (wave, scores), self._wave = self._wave, None
        self._enter(wave, scores.result())
        return [
            (request, number)
            for request in sorted({each.request for each in wave})
            for number in self._rule.given_up(self._unbeatable[request])
        ]

    def _enter(self, ended: Sequence[Ended], scores: Sequence[Score]) -> None:
        for each, score in zip(ended, scores, strict=True):
            unbeatable = self._rule.unbeatable(each.completion, score)
            self._unbeatable[each.request][each.number] = unbeatable
            self._finished[each.request][each.number] = each.completion, score

    def _score(self, ended: Sequence[Ended]) -> list[Score]:
        attempts = []
        for each in ended:
            problem, following = self._drafts[each.request]
            attempts.append(Attempt(problem, following.prompt, (each.completion,)))
        return [scored.group.scores[0] for scored in self._environment.step(None, attempts)]

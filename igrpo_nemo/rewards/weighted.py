"""The reward of a completion: a weighted sum of components, each kept beside the sum.

ScoreRequest --accuracy, functions of one's own (in process or through the pool), format, judge-->
components
reward = sum of weight x component                         (paper S.2: accuracy + format)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from igrpo_nemo.errors import UserError
from igrpo_nemo.rewards.accuracy import Verdict, verify_completion
from igrpo_nemo.rewards.custom import Caller, CustomReward, Outcome, component_name, outcome
from igrpo_nemo.rewards.extract import format_reward
from igrpo_nemo.types import Score, ScoreRequest

DEFAULT_WEIGHTS: Mapping[str, float] = {"accuracy": 1.0, "format": 1.0}


@runtime_checkable
class Scorer(Protocol):
    """Scores completions, in order. `close` frees what it holds and may be called twice."""

    component_names: tuple[str, ...]
    weights: dict[str, float]

    def __call__(self, requests: Sequence[ScoreRequest]) -> list[Score]: ...

    def metrics(self) -> dict[str, float]: ...

    def close(self) -> None: ...


class Verifier(Caller, Protocol):
    """Accuracy verdicts for completions, in order: in this process, or the pool."""

    def verdicts(self, requests: Sequence[ScoreRequest]) -> list[Verdict]: ...

    def close(self) -> None: ...


class InProcessVerifier:
    """The verifier in this process, without a time limit: for trusted completions and tests."""

    def verdicts(self, requests: Sequence[ScoreRequest]) -> list[Verdict]:
        return [
            verify_completion(
                each.problem.answer,
                each.text,
                thinking_open=each.thinking_open,
                truncated=each.truncated,
            )
            for each in requests
        ]

    def outcomes(self, path: str, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        return [outcome(path, request.problem, request.text) for request in requests]

    def close(self) -> None:
        """Nothing is held."""


Component = Callable[
    [Sequence[ScoreRequest], Sequence[Verdict]], Sequence[float | Mapping[str, float]]
]
"""A component's values in [0, 1] for the requests, given their accuracy verdicts. A mapping holds
the component under its name, and what else is to be seen in `Score.components`."""


BUILT_IN: Mapping[str, Component] = {
    "accuracy": lambda requests, verdicts: [float(each.correct) for each in verdicts],
    "format": lambda requests, verdicts: [
        format_reward(each.text, thinking_open=each.thinking_open) for each in requests
    ],
}


class WeightedScorer:
    """Accuracy, format and further components, summed with weights.

    `Score.components` holds each unweighted; `Score.reason` is the accuracy verdict's. The
    accuracy verdict is always taken (selection metrics need it), even at weight 0.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        verifier: Verifier,
        components: Mapping[str, Component] | None = None,
    ) -> None:
        known = {**BUILT_IN, **(components or {})}
        unknown = [name for name in weights if name not in known]
        if unknown:
            raise UserError(
                f"unknown reward component {unknown[0]!r}: known are {', '.join(sorted(known))}"
            )
        if not weights:
            raise UserError("no reward component: give at least one weight, such as accuracy: 1.0")
        self.weights = dict(weights)
        self.verifier = verifier
        self.component_names = tuple(dict.fromkeys(["accuracy", *weights]))
        self._components = {name: known[name] for name in self.component_names}
        self._counted: dict[str, float] = {}

    def __call__(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        if not requests:
            return []
        verdicts = self.verifier.verdicts(requests)
        columns = {
            name: component(requests, verdicts) for name, component in self._components.items()
        }
        scores = []
        for row, verdict in enumerate(verdicts):
            components: dict[str, float] = {}
            for name, column in columns.items():
                value = column[row]
                components |= value if isinstance(value, Mapping) else {name: value}
            reward = sum(weight * components[name] for name, weight in self.weights.items())
            scores.append(Score(reward, components, str(verdict.reason)))
        return scores

    def metrics(self) -> dict[str, float]:
        """What the verifier and the components have counted since the last call, a step's where it
        is asked once a step: `reward/<name>/...`."""
        parts = {"verifier": self.verifier, **self._components}
        total: dict[str, float] = {}
        for name, part in parts.items():
            counts = getattr(part, "metrics", None)
            for key, value in (counts() if counts else {}).items():
                total[f"reward/{name}/{key}"] = float(value)
        before, self._counted = self._counted, total
        return {name: value - before.get(name, 0.0) for name, value in total.items()}

    def close(self) -> None:
        self.verifier.close()
        for component in self._components.values():
            if close := getattr(component, "close", None):
                close()


def build_scorer(
    weights: Mapping[str, float] = DEFAULT_WEIGHTS,
    *,
    workers: int = 0,
    components: Mapping[str, Component] | None = None,
    functions: Sequence[str] = (),
    **pool_options: Any,
) -> WeightedScorer:
    """A scorer. With `workers` = 0 answers are compared in this process, without a time limit.

    Otherwise verdicts come from a pool of that many processes: `pool_options` are those of
    `rewards.pool.VerifierPool` (`item_timeout_s`, `memory_limit_mb`, ...). `functions` are paths
    of reward functions (`rewards.custom`), which run there too, each a component of its own name.
    Raises UserError for an unknown component or no weight.
    """
    verifier: Verifier = InProcessVerifier()
    if workers:
        from igrpo_nemo.rewards.pool import VerifierPool

        verifier = VerifierPool(workers=workers, functions=functions, **pool_options)
    own = {component_name(path): CustomReward(path, verifier) for path in functions}
    return WeightedScorer(weights, verifier, {**(components or {}), **own})

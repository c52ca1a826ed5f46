"""The batches of one training step, rolled out in their order; with prefetched drafts or without.

    position in the data -> problems -> rollout, with the drafts made for them beforehand
                                     -> position behind them, drafts made for the next batch

A step needs one batch; with dynamic sampling as many as it takes.
"""

from __future__ import annotations

from collections.abc import Sequence

from igrpo_nemo.data.order import EpochOrder, Position
from igrpo_nemo.local.prefetch import DraftsAhead
from igrpo_nemo.local.rollout import Ahead, TwoStageRollout
from igrpo_nemo.metrics import prefetch_metrics
from igrpo_nemo.types import Problem, Rollout


class StepBatches:
    """The state of one step's sampling. The trainer takes `position` and `ahead` over when the step
    is done, so that an abandoned step leaves nothing behind.

    `ahead` are the drafts made for the batch at `position`, where there are any. `prefetch` makes
    drafts for the batch behind each; at an epoch's end there is none. `redraws` says that this
    batch may belong to the same step.
    """

    def __init__(
        self,
        order: EpochOrder,
        problems: Sequence[Problem],
        rollout: TwoStageRollout,
        *,
        step: int,
        position: Position,
        ahead: DraftsAhead | None = None,
        prefetch: bool = False,
        redraws: bool = False,
    ) -> None:
        self.position = position
        self.ahead = ahead
        self.dropped = 0
        self._order, self._problems, self._rollout = order, problems, rollout
        self._step = step
        self._prefetch, self._redraws = prefetch, redraws
        self._rollouts: list[Rollout] = []
        self._ages: list[int | None] = []

    def roll_out(self, draw: int = 0) -> list[Rollout]:
        """Rolls the next batch out. `draw` counts the batches of the step."""
        numbers, behind = self._order.take(self.position)
        problems = [self._problems[number] for number in numbers]
        taken = self._take(problems)
        beside = self._beside(behind, draw)
        rollouts = self._rollout(
            problems,
            step=self._step,
            draw=draw,
            drafts=None if taken is None else taken.drafts,
            ahead=beside,
        )
        finished = self._step - 1
        self._rollouts += rollouts
        self._ages += [None if taken is None else finished - taken.made_at] * len(rollouts)
        self.position, self.ahead = behind, None
        if beside is not None:
            ids = tuple(problem.id for problem in beside.problems)
            self.ahead = DraftsAhead(behind, ids, beside.drafts, finished)
        return rollouts

    def _take(self, problems: Sequence[Problem]) -> DraftsAhead | None:
        """The drafts made for this batch; None where there are none, or others' (counted)."""
        if self.ahead is None:
            return None
        if self.ahead.fit(self.position, problems):
            return self.ahead
        self.dropped += len(self.ahead.drafts)
        return None

    def _beside(self, behind: Position, draw: int) -> Ahead | None:
        """What to draft for beside Stage 2 of the batch that ends at `behind`."""
        numbers = self._order.upcoming(behind) if self._prefetch else []
        if not numbers:
            return None
        problems = [self._problems[number] for number in numbers]
        # Named as without prefetch where the batch's step is known: no other draw has that name.
        if self._redraws:
            return Ahead(problems, self._step, draw + 1)
        return Ahead(problems, self._step + 1)

    def prefetch_metrics(self, dropped: int) -> dict[str, float]:
        """Where this step's drafts came from; `dropped` are those that fitted no batch so far."""
        return prefetch_metrics(self._rollouts, self._ages, dropped)

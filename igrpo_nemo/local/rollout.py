"""The two-stage rollout on the embedded engine: lines 4-14 of Algorithm 1, and what is trained.

    problems -> q -> N drafts -> environment "draft" -> q' -> G refinements -> environment "refine"
    rollouts -> collect_batch -> training rows -> shape_rows: NeMo-RL's scaling and penalties

Every draw is named by (seed, step, stage, problem), so a rollout depends neither on the batch it
was made in nor on what was sampled before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice

from igrpo_nemo.alarms import StallAlarm
from igrpo_nemo.config.nemo_keys import GRPO
from igrpo_nemo.data.order import Position
from igrpo_nemo.environment import Attempt, StepReturn, TwoStageEnvironment
from igrpo_nemo.errors import UserError
from igrpo_nemo.feedback import NextPrompt
from igrpo_nemo.local.sampler import Sampler, SampleRequest, SamplingParams
from igrpo_nemo.objectives.reward_shaping import nonzero_groups, overlong_penalties, scale_rewards
from igrpo_nemo.types import Problem, Rollout, Stage, TrainingRow


@dataclass(frozen=True, slots=True)
class TwoStageRollout:
    """Rolls problems out under the sampler's current policy.

    `timer(name)` times a part of it. `on_stage(stage, rows_done, rows_total)` reports progress; it
    may raise to abandon the rollout. `alarm` knows what is waited for.
    """

    environment: TwoStageEnvironment
    sampler: Sampler
    params: SamplingParams
    seed: int
    timer: Callable[[str], AbstractContextManager[object]] = lambda name: nullcontext()
    on_stage: Callable[[Stage, int, int], None] = lambda stage, done, total: None
    alarm: StallAlarm = StallAlarm(0, print)

    def __call__(self, problems: Sequence[Problem], *, step: int, draw: int = 0) -> list[Rollout]:
        """One rollout per problem, in order. `draw` counts repeated draws within a step."""
        first = [(problem, self.environment.reset(problem)) for problem in problems]
        drafted = self._stage(Stage.DRAFT, first, step, draw)
        second = [(each.group.problem, prompt) for each in drafted for prompt in each.observations]
        refined = iter(self._stage(Stage.REFINE, second, step, draw))
        return [
            Rollout(
                problem=result.group.problem,
                drafts=result.group,
                selection=result.selection,
                refinements=tuple(next(refined).group for _ in result.observations),
            )
            for result in drafted
        ]

    def _stage(
        self, stage: Stage, prompts: Sequence[tuple[Problem, NextPrompt]], step: int, draw: int
    ) -> list[StepReturn]:
        """Samples a stage's completions and lets the environment judge them."""
        if not prompts:
            return []
        requests, seen = [], dict[str, int]()
        for problem, following in prompts:
            # A problem may have several prompts in Stage 2.
            position = seen.get(problem.id, 0)
            seen[problem.id] = position + 1
            key = f"{self.seed}/{step}/{draw}/{stage}/{problem.id}/{position}"
            requests.append(SampleRequest(following.prompt.token_ids, following.num_samples, key))
        ids = list(seen)
        with self.timer(str(stage)), self.alarm.waiting(f"{stage}, sampling", ids) as moved:

            def on_progress(done: int, total: int) -> None:
                moved()
                self.on_stage(stage, done, total)

            completions = self.sampler.sample(requests, self.params, on_progress=on_progress)
        attempts = [
            Attempt.at(problem, following, rows)
            for (problem, following), rows in zip(prompts, completions, strict=True)
        ]
        with self.timer("reward"), self.alarm.waiting(f"{stage}, rewards", ids):
            return self.environment.step(stage, attempts, step=step)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step is trained on, everything that was rolled out for it, and the position in the
    data behind it."""

    rollouts: list[Rollout]
    rows: list[TrainingRow]
    sampled: list[Rollout]
    behind: Position
    draws: int = 1


def collect_batch(
    draws: Iterator[tuple[list[Rollout], Position]],
    grpo: GRPO,
    training_rows: Callable[[Rollout], list[TrainingRow]],
) -> Batch | None:
    """The batch of one step: all of one draw or, with dynamic sampling, the first
    `grpo.num_prompts_per_step` problems that have an advantage, of as many draws as it takes.

    Groups whose rewards are all equal have zero advantage and teach nothing (DAPO, arXiv
    2503.14476, section 3.2). The filter looks at the groups that are trained and, like NeMo-RL's,
    at the task's rewards and not at length penalties; a redraw takes new problems through both
    stages. None where the draws end before the batch is complete: all epochs are over. Raises
    `UserError` after `grpo.dynamic_sampling_max_gen_batches` draws.
    """
    dynamic, wanted = grpo.use_dynamic_sampling, grpo.num_prompts_per_step
    limit = grpo.dynamic_sampling_max_gen_batches if dynamic else 1
    kept: list[Rollout] = []
    rows: list[TrainingRow] = []
    sampled: list[Rollout] = []
    count = 0
    for count, (rollouts, behind) in enumerate(islice(draws, limit), start=1):
        sampled += rollouts
        for rollout in rollouts:
            candidate = training_rows(rollout)
            groups = nonzero_groups([r.reward for r in candidate], [r.group for r in candidate])
            if not dynamic or (len(kept) < wanted and any(groups.values())):
                kept.append(rollout)
                rows += candidate
        if not dynamic or len(kept) == wanted:
            return Batch(kept, rows, sampled, behind, count)
    if count < limit:
        return None
    raise UserError(
        f"dynamic sampling found {len(kept)} of {wanted} groups with an advantage in {limit} "
        "batches: raise grpo.dynamic_sampling_max_gen_batches, or choose problems that the policy "
        "sometimes solves and sometimes fails"
    )


def shape_rows(rows: Sequence[TrainingRow], grpo: GRPO) -> list[TrainingRow]:
    """Rows with the rewards that the objective sees: scaled (`grpo.reward_scaling`), then shaped
    (`grpo.reward_shaping`); unchanged where both are off.

    `stop_properly_penalty_coef` multiplies the reward of truncated completions and replaces the
    overlong penalty, as in NeMo-RL (nemo_rl/algorithms/reward_functions.py).
    """
    scaling, shaping = grpo.reward_scaling, grpo.reward_shaping
    rewards = [row.reward for row in rows]
    if scaling.enabled:
        rewards = scale_rewards(rewards, **scaling.model_dump(exclude={"enabled"}))
    if shaping.enabled and (coef := shaping.stop_properly_penalty_coef) is not None:
        rewards = [
            reward * coef if row.completion.truncated else reward
            for row, reward in zip(rows, rewards, strict=True)
        ]
    elif shaping.enabled and shaping.max_response_length is not None:
        lengths = [len(row.completion.token_ids) for row in rows]
        other = {"enabled", "stop_properly_penalty_coef"}
        penalties = overlong_penalties(lengths, **shaping.model_dump(exclude=other))
        rewards = [r + p for r, p in zip(rewards, penalties, strict=True)]
    return [replace(row, reward=reward) for row, reward in zip(rows, rewards, strict=True)]

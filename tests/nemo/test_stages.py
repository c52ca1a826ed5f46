"""The two stages as plain functions: pipelining, errors, routes, drafts ahead."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from unittest import mock

import pytest

from igrpo_nemo.alarms import StallAlarm
from igrpo_nemo.environment import StepReturn
from igrpo_nemo.feedback import BestDraft, NextPrompt
from igrpo_nemo.nemo.failure import RolloutError
from igrpo_nemo.nemo.stages import (
    AHEAD,
    Backends,
    Item,
    at_own_pace,
    one_by_one,
    roll_out,
    together,
)
from igrpo_nemo.types import Completion, Group, Problem, Prompt, Score, Stage, StopReason


class Engine:
    """Answers `texts[position]` in order, after the seconds given with each text; then at once."""

    def __init__(self, answers):
        self.answers = {position: list(rows) for position, rows in answers.items()}
        self.asked: list[str] = []
        self.cancelled: list[str] = []

    async def sample(self, wanted, then):
        return await one_by_one(wanted, then, self._group)

    async def _group(self, wanted):
        return await together([self._one(wanted) for _ in range(wanted.next.num_samples)])

    async def _one(self, wanted) -> Completion:
        self.asked.append(f"{wanted.stage} {wanted.next.prompt.text}")
        rest = self.answers[wanted.item.position]
        seconds, text = rest.pop(0) if rest else (0.0, "0 more")
        if isinstance(text, Exception):
            raise text
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.cancelled.append(text)
            raise
        reason = StopReason.LENGTH if text.endswith("cut") else StopReason.EOS
        return Completion(text, (1,), (), reason)


class Environment:
    """A completion's reward is the number that it begins with; `prompts` q' follow a draft."""

    def __init__(self, feedback, prompts):
        self.feedback = feedback
        self.prompts = prompts
        self.steps: list[tuple[Stage | None, str]] = []

    async def step(self, stage, attempt):
        self.steps.append((stage, attempt.problem.id))
        scores = tuple(Score(float(c.text.split()[0])) for c in attempt.completions)
        group = Group(
            attempt.problem, stage or Stage.DRAFT, attempt.prompt, attempt.completions, scores
        )
        if stage is not Stage.DRAFT:
            return StepReturn(group, None, (), True)
        selection = self.feedback.select(group, 0)
        shown = attempt.completions[selection.index].text
        names = [""] if self.prompts == 1 else [f"/{n}" for n in range(self.prompts)]
        following = tuple(
            NextPrompt(Prompt(f"after {shown}{name}", (2,)), self.feedback.num_refinements)
            for name in names
        )
        return StepReturn(group, selection, following, False)


def items(count: int) -> list[Item]:
    return [Item(Problem(f"p{n}", "q", "a"), Prompt("q", (1,)), n) for n in range(count)]


def backends(answers, *, prompts=1) -> Backends:
    feedback = BestDraft(2, 2)
    return Backends(Engine(answers), Environment(feedback, prompts), feedback.num_drafts)


def rolled_out(count, answers, **options):
    on = backends(answers, **options)
    rollouts, _ = asyncio.run(at_own_pace(items(count), on))
    return rollouts, on


def test_a_problem_goes_on_while_another_still_drafts():
    answers = {
        0: [(0.2, "0 slow"), (0.0, "1 a"), (0.0, "0 r"), (0.0, "0 r")],
        1: [(0.0, "0 b"), (0.0, "1 c"), (0.0, "1 s"), (0.0, "0 t")],
    }
    rollouts, on = rolled_out(2, answers)
    order = [step for step in on.environment.steps if step[0] is Stage.REFINE]
    assert order == [(Stage.REFINE, "p1"), (Stage.REFINE, "p0")]
    assert on.environment.steps.index((Stage.REFINE, "p1")) < on.environment.steps.index(
        (Stage.DRAFT, "p0")
    )
    assert [r.problem.id for r in rollouts] == ["p0", "p1"]
    assert rollouts[0].refinements[0].prompt.text == "after 1 a"
    assert [c.text for c in rollouts[1].refinements[0].completions] == ["1 s", "0 t"]


def test_an_error_names_its_problem_and_stops_the_others():
    answers = {
        0: [(5.0, "0 a"), (5.0, "0 b")],
        1: [(0.0, ValueError("engine on fire")), (5.0, "0 c")],
    }
    on = backends(answers)
    with pytest.raises(RolloutError, match="problem p1, stage draft: engine on fire"):
        asyncio.run(at_own_pace(items(2), on))
    assert sorted(on.engine.cancelled) == ["0 a", "0 b", "0 c"]


def test_stage_by_stage_nobody_refines_before_all_have_drafted():
    answers = {n: [(0.1 * n, "1 a"), (0.0, "0 b")] for n in range(2)}
    on = backends(answers)
    rollouts, _ = asyncio.run(roll_out(items(2), on))
    assert on.environment.steps == [(Stage.DRAFT, "p0"), (Stage.DRAFT, "p1")] + [
        (Stage.REFINE, "p0"), (Stage.REFINE, "p1"),
    ]  # fmt: skip
    assert [each.selection.index for each in rollouts] == [0, 0]


def test_several_stage_two_prompts_are_sampled_beside_each_other():
    """A feedback may ask for more than one q': each is a group of its own."""
    answers = {0: [(0.0, "1 a"), (0.0, "0 b"), *[(0.2, f"{n} r") for n in range(6)]]}
    start = time.monotonic()
    [rollout], on = rolled_out(1, answers, prompts=3)
    assert time.monotonic() - start < 0.4
    assert [group.prompt.text for group in rollout.refinements] == [
        "after 1 a/0", "after 1 a/1", "after 1 a/2",
    ]  # fmt: skip
    assert [len(group.completions) for group in rollout.refinements] == [2, 2, 2]
    assert on.engine.asked[2:] == [f"refine after 1 a/{n}" for n in (0, 0, 1, 1, 2, 2)]


@pytest.mark.parametrize("run", [roll_out, at_own_pace])
def test_the_alarm_names_what_is_waited_for(run):
    """Of p0 the drafts, of p1 the rewards of its refinements; what came in time is not named."""
    answers = {0: [(0.3, "0 slow"), (0.0, "1 a")], 1: [(0.0, "0 b"), (0.0, "1 c")]}
    said: list[str] = []
    on, step = backends(answers), Environment.step

    async def slow(environment, stage, attempt):
        if (stage, attempt.problem.id) == (Stage.REFINE, "p1"):
            await asyncio.sleep(0.3)
        return await step(environment, stage, attempt)

    with StallAlarm(0.1, said.append) as alarm, mock.patch.object(Environment, "step", slow):
        asyncio.run(run(items(2), replace(on, alarm=alarm)))
    told = " ".join(said)
    assert "draft, sampling of p0" in told and "refine, rewards of p1" in told
    assert "refine, sampling" not in told and "draft, rewards" not in told


@pytest.mark.parametrize("run", [roll_out, at_own_pace])
def test_drafts_for_the_next_step_are_sampled_beside_the_refinements(run):
    answers = {
        0: [(0.0, "1 a"), (0.0, "0 b"), (0.1, "0 r"), (0.1, "0 r"), (0.0, "1 n"), (0.0, "0 n")]
    }
    on = backends(answers)
    [rollout], [ahead] = asyncio.run(run(items(1), on, None, items(1)))
    assert [c.text for c in ahead] == ["1 n", "0 n"]
    assert [c.text for c in rollout.refinements[0].completions] == ["0 r", "0 r"]
    assert on.engine.asked[2:] == ["refine after 1 a"] * 2 + [f"{AHEAD} q"] * 2
    assert len(on.environment.steps) == 2
    on = backends({0: [(0.0, "0 x"), (0.0, "0 y")]})
    [rollout], nothing = asyncio.run(run(items(1), on, [ahead], []))
    assert rollout.refinements[0].prompt.text == "after 1 n"
    assert on.engine.asked == ["refine after 1 n"] * 2
    assert nothing == []
